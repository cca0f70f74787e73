//! The addresses that the fence's DNS gives out: one for a name, and the same for as long as the
//! fence lives, since programs keep what they once resolved.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::policy::Host;

/// 198.18.0.0/15, which no one routes (RFC 2544): its first address, and how many are given out at
/// most.
const FIRST: u32 = Ipv4Addr::new(198, 18, 0, 1).to_bits();
const SIZE: usize = 0x1_FFFE;

/// The most names under wildcards that get one: those are the agent's to invent, about 300 bytes
/// each. Names that the policy spells out always get one, and are as many as the policy has.
const WILD: usize = 16_000;

/// Both directions.
pub(crate) struct Pool(Mutex<State>);

#[derive(Default)]
struct State {
    /// By number; never shrinks.
    names: Vec<Arc<Host>>,
    numbers: HashMap<Arc<Host>, u32>,
    wild: usize,
}

/// What makes a name worth an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// The policy spells it out.
    Exact,
    /// It exists, and a wildcard covers it.
    Wild,
}

impl Pool {
    pub(crate) fn new() -> Self {
        Self(Mutex::default())
    }

    /// The name that an address was given out for.
    pub(crate) fn name(&self, ip: Ipv4Addr) -> Option<Arc<Host>> {
        let number = usize::try_from(ip.to_bits().checked_sub(FIRST)?).ok()?;
        self.state().names.get(number).cloned()
    }

    /// The address that a name was given.
    pub(crate) fn address(&self, host: &Host) -> Option<Ipv4Addr> {
        self.state().numbers.get(host).map(|number| Ipv4Addr::from_bits(FIRST + number))
    }

    /// The address that a name has from now on; none when there are no more.
    pub(crate) fn assign(&self, host: &Host, why: Why) -> Option<Ipv4Addr> {
        let mut state = self.state();
        if let Some(number) = state.numbers.get(host) {
            return Some(Ipv4Addr::from_bits(FIRST + number));
        }
        let full = why == Why::Wild && state.wild >= WILD;
        if full || state.names.len() >= SIZE {
            return None;
        }
        let number = u32::try_from(state.names.len()).ok()?;
        state.wild += usize::from(why == Why::Wild);
        let host = Arc::new(host.clone());
        state.names.push(Arc::clone(&host));
        state.numbers.insert(host, number);
        Some(Ipv4Addr::from_bits(FIRST + number))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the pool could give this address out.
pub(super) fn covers(ip: Ipv4Addr) -> bool {
    matches!(ip.octets(), [198, 18 | 19, ..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(number: usize) -> Host {
        Host::parse(&format!("h{number}.example.com")).expect("host")
    }

    #[test]
    fn an_address_leads_back_to_its_name_for_ever() {
        let pool = Pool::new();
        assert_eq!(pool.address(&host(0)), None);
        assert_eq!(pool.name(Ipv4Addr::new(198, 18, 0, 1)), None);
        let first = pool.assign(&host(0), Why::Exact).expect("address");
        assert_eq!(first, Ipv4Addr::new(198, 18, 0, 1));
        let second = pool.assign(&host(1), Why::Wild).expect("address");
        assert_ne!(first, second);
        for why in [Why::Exact, Why::Wild] {
            assert_eq!(pool.assign(&host(0), why), Some(first));
        }
        assert_eq!(pool.address(&host(0)), Some(first));
        assert_eq!(*pool.name(first).expect("name"), host(0));
        assert_eq!(*pool.name(second).expect("name"), host(1));
        for other in ["198.18.0.0", "198.18.0.3", "0.0.0.0", "255.255.255.255"] {
            assert!(pool.name(other.parse().expect("ip")).is_none(), "{other}");
        }
    }

    #[test]
    fn names_that_the_agent_invents_run_out_and_those_of_the_policy_do_not() {
        let pool = Pool::new();
        for number in 0..WILD {
            let ip = pool.assign(&host(number), Why::Wild).expect("address");
            assert!(covers(ip), "{ip}");
        }
        assert_eq!(pool.assign(&host(WILD), Why::Wild), None);
        assert!(pool.assign(&host(0), Why::Wild).is_some(), "what has one keeps it");
        assert!(pool.assign(&host(WILD), Why::Exact).is_some());
        let last = Ipv4Addr::from_bits(FIRST + u32::try_from(SIZE).expect("u32") - 1);
        assert_eq!(last, Ipv4Addr::new(198, 19, 255, 254));
    }
}
