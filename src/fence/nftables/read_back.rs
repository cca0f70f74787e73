//! Compares what the kernel shows with what was written.

use std::os::fd::OwnedFd;

use netlink_packet_core::{NLM_F_DUMP, NlasIterator};

use super::super::error::{NetworkError, Result};
use super::super::netlink::Batch;
use super::expression::{DATA, NAME};
use super::{
    CHAIN_TABLE, CHAINS, RULE_CHAIN, RULE_EXPRESSIONS, RULE_TABLE, Rule, TABLE, header, kind,
    string,
};

/// Lists all objects of a kind in the namespace, not only those of our table: no other table may
/// be there.
fn list(socket: &OwnedFd, what: &'static str, message: libc::c_int) -> Result<Vec<Vec<u8>>> {
    let mut batch = Batch::new();
    let all = header(libc::AF_UNSPEC, 0);
    batch.push("list", what, kind(message), NLM_F_DUMP, &all);
    let replies = batch.exchange(socket)?;
    let attributes = |payload: &[u8]| payload.get(4..).map(<[u8]>::to_vec);
    Ok(replies.messages.iter().filter_map(|reply| attributes(&reply.payload)).collect())
}

pub(super) fn chains(socket: &OwnedFd) -> Result<()> {
    let found = list(socket, "the chains of packet rules", libc::NFT_MSG_GETCHAIN)?;
    let same = found.len() == CHAINS.len()
        && found.iter().zip(&CHAINS).all(|(shown, chain)| {
            let mut wanted = Vec::new();
            string(&mut wanted, CHAIN_TABLE, TABLE);
            chain.write(&mut wanted);
            includes(shown, &wanted)
        });
    if same {
        return Ok(());
    }
    let found = format!("{} chains, or other than those written", found.len());
    Err(NetworkError::differs("read back", "the chains of packet rules", found))
}

pub(super) fn rules(socket: &OwnedFd, rules: &[Rule]) -> Result<()> {
    let found = list(socket, "the packet rules", libc::NFT_MSG_GETRULE)?;
    if found.len() != rules.len() {
        let found = format!("{} instead of {}", found.len(), rules.len());
        return Err(NetworkError::differs("read back", "the packet rules", found));
    }
    for (shown, rule) in found.iter().zip(rules) {
        let mut wanted = Vec::new();
        string(&mut wanted, RULE_TABLE, TABLE);
        string(&mut wanted, RULE_CHAIN, rule.chain);
        let shown_expressions = value(shown, RULE_EXPRESSIONS).unwrap_or_default();
        if !includes(shown, &wanted) || !same_expressions(shown_expressions, &rule.expressions) {
            let object = format!("the packet rule \"{}\"", rule.text);
            return Err(NetworkError::differs("read back", object, "it is another".into()));
        }
    }
    Ok(())
}

/// The attributes of a list, with the flag bits of their kind removed. Ends at one that is
/// malformed.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(std::result::Result::ok).map(|nla| {
        let length = nla.value_length();
        (nla.kind(), &nla.into_inner()[4..4 + length])
    })
}

fn value(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(k, value)| (k == kind).then_some(value))
}

/// Every attribute of `wanted` is in `shown` with the same value. The kernel adds others: handles,
/// counts, defaults.
fn includes(shown: &[u8], wanted: &[u8]) -> bool {
    attributes(wanted).all(|(kind, wanted)| value(shown, kind) == Some(wanted))
}

/// The same expressions in the same order, each with all that was asked for.
pub(super) fn same_expressions(shown: &[u8], wanted: &[u8]) -> bool {
    attributes(shown).count() == attributes(wanted).count()
        && attributes(shown).zip(attributes(wanted)).all(|((_, shown), (_, wanted))| {
            value(shown, NAME) == value(wanted, NAME)
                && includes(
                    value(shown, DATA).unwrap_or_default(),
                    value(wanted, DATA).unwrap_or_default(),
                )
        })
}
