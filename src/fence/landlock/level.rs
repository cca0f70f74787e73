//! What each Landlock ABI can do, and what of it a fence uses: pure, from the ABI's number.
//!
//! | ABI | Linux | used |
//! |---|---|---|
//! | 1 | 5.13 | files: reading, writing, executing, making, removing |
//! | 2 | 5.19 | moving between directories |
//! | 3 | 6.2 | truncation |
//! | 4 | 6.7 | nothing: TCP, see below |
//! | 5 | 6.10 | device ioctls |
//! | 6 | 6.12 | scopes: signals, abstract unix sockets |
//! | 7, 8 | 6.15, 7.0 | nothing: audit, all threads at once |
//! | 9 | 7.1 | pathname unix sockets |
//! | 10 | 7.2 | nothing: UDP |
//!
//! TCP and UDP are left alone at every level. A rule for connect(2) names ports, and a captured
//! connection (a program that knows no proxy) goes to any port of any address: a rule that let the
//! proxy's port pass alone would fail it with EACCES before the gateway could catch it, and one
//! that lets all ports pass adds nothing. Nor would it guard anything: in the agent's network
//! namespace there is one cable, and its far end holds our listeners only. bind(2) likewise: agents
//! serve on what port they like, and nobody but the gateway can reach it.

use landlock::{ABI, Access as _, AccessFs, BitFlags, Scope};

use super::{Access, Enforced, LandlockError};

/// Truncation is a right of its own from ABI 3. Without it `read_only` does not hold.
pub const HARD_REQUIREMENT_ABI: i32 = 3;
/// Both scopes are there.
pub(super) const FULL_ABI: i32 = 6;
/// Connecting to a pathname unix socket is a right of its own.
pub const UNIX_SOCKETS_ABI: i32 = 9;

/// The kernel's Landlock ABI, 0 when it has none or it is switched off.
#[must_use]
pub fn abi() -> i32 {
    ask(1).unwrap_or(0)
}

/// One of the two questions that the call answers without attributes: 1 the ABI, 2 the errata.
fn ask(question: libc::c_ulong) -> Option<i32> {
    let nothing: libc::size_t = 0;
    // SAFETY: with these flags the call takes no attributes and only returns a number.
    let result = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            nothing,
            question,
        )
    };
    i32::try_from(result).ok().filter(|answer| *answer >= 0)
}

/// What a domain handles: a right that is handled and that no rule grants is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Handled {
    pub files: BitFlags<AccessFs>,
    pub scopes: BitFlags<Scope>,
}

/// Everything that a kernel of this ABI knows and this program does.
pub(super) fn handled(abi: i32) -> Handled {
    let abi = ABI::from(abi);
    Handled { files: AccessFs::from_all(abi), scopes: Scope::from_all(abi) }
}

/// What a rule grants. The kernel refuses directory rights on anything but a directory.
///
/// A directory grants no connection to a unix socket below it, whoever may write there: what
/// listens behind one is outside the fence, on the pod's network or the node's. (Sockets that were
/// made inside the domain need no right.) A rule that names the socket itself grants it.
pub(super) fn rights(access: Access, is_directory: bool, abi: i32) -> BitFlags<AccessFs> {
    let abi = ABI::from(abi);
    let rights = match access {
        Access::ReadOnly => AccessFs::from_read(abi),
        Access::ReadWrite => AccessFs::from_all(abi),
    };
    if is_directory { rights & !AccessFs::ResolveUnix } else { rights & AccessFs::from_file(abi) }
}

/// Whether a kernel of this ABI may be used where the policy says `hard_requirement` (`hard`).
pub(super) fn demand(abi: i32, hard: bool) -> Result<(), LandlockError> {
    if hard && abi < HARD_REQUIREMENT_ABI {
        return Err(LandlockError::Kernel { have: abi });
    }
    Ok(())
}

/// What of a fence's rights a kernel lacks, by name.
pub(super) fn missing(abi: i32) -> Vec<&'static str> {
    [
        (1, "files"),
        (2, "moving between directories"),
        (HARD_REQUIREMENT_ABI, "truncation"),
        (5, "device ioctls"),
        (FULL_ABI, "signal and abstract unix socket scopes"),
        (UNIX_SOCKETS_ABI, "pathname unix sockets"),
    ]
    .into_iter()
    .filter_map(|(since, name)| (abi < since).then_some(name))
    .collect()
}

/// How much of the file rules holds where a domain was taken on.
pub(super) fn grade(abi: i32) -> Enforced {
    if abi >= FULL_ABI {
        return Enforced::Full;
    }
    Enforced::Partial(format!("the kernel (Landlock ABI {abi}) lacks {}", missing(abi).join(", ")))
}

/// Faults of Landlock itself that the running kernel has, as far as they touch what a fence uses.
///
/// Kernels say from Linux 6.15 on, and older ones that got the fixes, which are mended. Nothing is
/// switched off for their sake: a right with a fault guards better than none.
#[must_use]
pub fn errata(abi: i32) -> Vec<&'static str> {
    open_errata(abi, ask(2))
}

fn open_errata(abi: i32, fixed: Option<i32>) -> Vec<&'static str> {
    if abi == 0 {
        return Vec::new();
    }
    let Some(fixed) = fixed else {
        return vec!["unknown: this kernel does not say which faults are mended"];
    };
    [
        // The first erratum is of TCP rules, which are not used.
        (2, FULL_ABI, "2: a thread may not signal threads of its own process in another domain"),
        (3, 1, "3: moving out of a directory that was cut off below a bind mount can widen rights"),
    ]
    .into_iter()
    .filter_map(|(number, since, name)| {
        (abi >= since && fixed & (1 << (number - 1)) == 0).then_some(name)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The newest ABI that the crate knows, and one beyond, which is used like it.
    const LEVELS: std::ops::RangeInclusive<i32> = 0..=11;

    type Row = (i32, u32, u32, [u32; 4], bool, &'static str);

    /// Written down, not computed: number of file rights, of scopes, of those that a read-only and
    /// a read-write rule grant on a directory and on a file, whether `hard_requirement` starts, and
    /// the first thing missing.
    const TABLE: [Row; 12] = [
        (0, 0, 0, [0, 0, 0, 0], false, "files"),
        (1, 13, 0, [3, 2, 13, 3], false, "moving between directories"),
        (2, 14, 0, [3, 2, 14, 3], false, "truncation"),
        (3, 15, 0, [3, 2, 15, 4], true, "device ioctls"),
        (4, 15, 0, [3, 2, 15, 4], true, "device ioctls"),
        (5, 16, 0, [3, 2, 16, 5], true, "signal and abstract unix socket scopes"),
        (6, 16, 2, [3, 2, 16, 5], true, "pathname unix sockets"),
        (7, 16, 2, [3, 2, 16, 5], true, "pathname unix sockets"),
        (8, 16, 2, [3, 2, 16, 5], true, "pathname unix sockets"),
        (9, 17, 2, [3, 2, 16, 6], true, ""),
        (10, 17, 2, [3, 2, 16, 6], true, ""),
        (11, 17, 2, [3, 2, 16, 6], true, ""),
    ];

    #[test]
    fn each_level_is_what_the_table_says() {
        assert_eq!(TABLE.map(|row| row.0).to_vec(), LEVELS.collect::<Vec<_>>());
        for (abi, files, scopes, grants, hard, lacks) in TABLE {
            let Handled { files: handled_files, scopes: handled_scopes } = handled(abi);
            assert_eq!(handled_files.bits().count_ones(), files, "ABI {abi}: file rights");
            assert_eq!(handled_scopes.bits().count_ones(), scopes, "ABI {abi}: scopes");
            let granted = [
                (Access::ReadOnly, true),
                (Access::ReadOnly, false),
                (Access::ReadWrite, true),
                (Access::ReadWrite, false),
            ]
            .map(|(access, is_directory)| rights(access, is_directory, abi));
            let number = granted.map(|rights| rights.bits().count_ones());
            assert_eq!(number, grants, "ABI {abi}: granted rights");
            // The kernel refuses a rule that grants what the domain does not handle.
            assert!(granted.iter().all(|rights| handled_files.contains(*rights)), "ABI {abi}");
            assert_eq!(demand(abi, true).is_ok(), hard, "ABI {abi}: hard_requirement");
            assert!(demand(abi, false).is_ok(), "ABI {abi}: best_effort");
            assert_eq!(missing(abi).first().copied().unwrap_or_default(), lacks, "ABI {abi}");
            assert_eq!(grade(abi) == Enforced::Full, abi >= 6, "ABI {abi}");
        }
    }

    #[test]
    fn a_level_never_takes_away_what_a_lower_one_had() {
        for abi in LEVELS.skip(1) {
            let (below, here) = (handled(abi - 1), handled(abi));
            assert!(here.files.contains(below.files) && here.scopes.contains(below.scopes));
            assert!(missing(abi).len() <= missing(abi - 1).len());
        }
    }

    #[test]
    fn rights_by_the_kind_of_file() {
        for abi in LEVELS.skip(1) {
            let file = rights(Access::ReadWrite, false, abi);
            assert!(!file.intersects(AccessFs::ReadDir | AccessFs::MakeReg | AccessFs::RemoveFile));
            assert!(!file.contains(AccessFs::Refer) && !file.contains(AccessFs::MakeSock));
            assert!(file.contains(AccessFs::ReadFile | AccessFs::WriteFile));
            assert_eq!(file.contains(AccessFs::IoctlDev), abi >= 5);
            assert_eq!(file.contains(AccessFs::Truncate), abi >= 3);
            let read = rights(Access::ReadOnly, true, abi);
            assert_eq!(read, AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::Execute);
            assert_eq!(
                rights(Access::ReadOnly, false, abi),
                AccessFs::ReadFile | AccessFs::Execute
            );
            // No directory grants connecting to what lies in it; the socket itself does.
            for access in [Access::ReadOnly, Access::ReadWrite] {
                assert!(!rights(access, true, abi).contains(AccessFs::ResolveUnix));
            }
            assert_eq!(file.contains(AccessFs::ResolveUnix), abi >= 9);
            assert_eq!(handled(abi).files.contains(AccessFs::ResolveUnix), abi >= 9);
        }
    }

    #[test]
    fn refusals_name_what_the_kernel_has() {
        let error = demand(2, true).unwrap_err().to_string();
        assert!(error.contains("ABI 2") && error.contains("needs 3"), "{error}");
        assert!(matches!(grade(2), Enforced::Partial(text) if text.contains("truncation")));
        assert_eq!(missing(0).len(), 6);
    }

    #[test]
    fn faults_that_touch_a_fence() {
        assert!(open_errata(0, Some(0)).is_empty());
        assert_eq!(open_errata(5, Some(0)).len(), 1);
        assert_eq!(open_errata(7, Some(0)).len(), 2);
        assert!(open_errata(7, Some(0b110)).is_empty());
        assert!(open_errata(7, Some(0b010))[0].starts_with("3:"));
        assert!(open_errata(7, None)[0].starts_with("unknown"));
        // A kernel newer than this program has mended more.
        assert!(open_errata(11, Some(0x7FFF_FFFF)).is_empty());
        println!("ABI {}: {:?}, raw {:?}", abi(), errata(abi()), ask(2));
    }
}
