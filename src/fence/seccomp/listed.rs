//! What the filters answer to each call of `x86_64`, written down: the names and numbers are the
//! kernel's (`arch/x86/entry/syscalls/syscall_64.tbl` up to Linux 6.17), not the table's, so
//! that a call that slips out of the table, or into it, is seen.

use std::collections::BTreeSet;

use super::assembler::NATIVE_ARCH;
use super::interpreter::{Call, run};
use super::tests::{ALLOW, GARBAGE, refused};
use super::*;

/// Refused to the agent with EPERM, whatever the arguments, or when they are all zero (`socket`, `socketpair`).
const EPERM: &str = "
41:socket 53:socketpair 101:ptrace 103:syslog 153:vhangup 155:pivot_root 159:adjtimex 163:acct
164:settimeofday 165:mount 166:umount2 167:swapon 168:swapoff 169:reboot 170:sethostname
171:setdomainname 172:iopl 173:ioperm 175:init_module 176:delete_module 179:quotactl
212:lookup_dcookie 227:clock_settime 246:kexec_load 248:add_key 249:request_key 250:keyctl
298:perf_event_open 300:fanotify_init 303:name_to_handle_at 304:open_by_handle_at
305:clock_adjtime 308:setns 310:process_vm_readv 311:process_vm_writev 312:kcmp 313:finit_module
319:memfd_create 320:kexec_file_load 321:bpf 323:userfaultfd 424:pidfd_send_signal
425:io_uring_setup 426:io_uring_enter 427:io_uring_register 428:open_tree 429:move_mount
430:fsopen 431:fsconfig 432:fsmount 433:fspick 434:pidfd_open 438:pidfd_getfd
440:process_madvise 442:mount_setattr 443:quotactl_fd 447:memfd_secret 467:open_tree_attr
";

/// Answered ENOSYS, so that the C library takes an older call.
const ENOSYS: &str = "435:clone3";

/// Allowed to it when the arguments are all zero.
const ALLOWED: &str = "
0:read 1:write 2:open 3:close 4:stat 5:fstat 6:lstat 7:poll 8:lseek 9:mmap 10:mprotect 11:munmap
12:brk 13:rt_sigaction 14:rt_sigprocmask 15:rt_sigreturn 16:ioctl 17:pread64 18:pwrite64
19:readv 20:writev 21:access 22:pipe 23:select 24:sched_yield 25:mremap 26:msync 27:mincore
28:madvise 29:shmget 30:shmat 31:shmctl 32:dup 33:dup2 34:pause 35:nanosleep 36:getitimer
37:alarm 38:setitimer 39:getpid 40:sendfile 42:connect 43:accept 44:sendto 45:recvfrom
46:sendmsg 47:recvmsg 48:shutdown 49:bind 50:listen 51:getsockname 52:getpeername 54:setsockopt
55:getsockopt 56:clone 57:fork 58:vfork 59:execve 60:exit 61:wait4 62:kill 63:uname 64:semget
65:semop 66:semctl 67:shmdt 68:msgget 69:msgsnd 70:msgrcv 71:msgctl 72:fcntl 73:flock 74:fsync
75:fdatasync 76:truncate 77:ftruncate 78:getdents 79:getcwd 80:chdir 81:fchdir 82:rename
83:mkdir 84:rmdir 85:creat 86:link 87:unlink 88:symlink 89:readlink 90:chmod 91:fchmod 92:chown
93:fchown 94:lchown 95:umask 96:gettimeofday 97:getrlimit 98:getrusage 99:sysinfo 100:times
102:getuid 104:getgid 105:setuid 106:setgid 107:geteuid 108:getegid 109:setpgid 110:getppid
111:getpgrp 112:setsid 113:setreuid 114:setregid 115:getgroups 116:setgroups 117:setresuid
118:getresuid 119:setresgid 120:getresgid 121:getpgid 122:setfsuid 123:setfsgid 124:getsid
125:capget 126:capset 127:rt_sigpending 128:rt_sigtimedwait 129:rt_sigqueueinfo
130:rt_sigsuspend 131:sigaltstack 132:utime 133:mknod 134:uselib 135:personality 136:ustat
137:statfs 138:fstatfs 139:sysfs 140:getpriority 141:setpriority 142:sched_setparam
143:sched_getparam 144:sched_setscheduler 145:sched_getscheduler 146:sched_get_priority_max
147:sched_get_priority_min 148:sched_rr_get_interval 149:mlock 150:munlock 151:mlockall
152:munlockall 154:modify_ldt 156:_sysctl 157:prctl 158:arch_prctl 160:setrlimit 161:chroot
162:sync 174:create_module 177:get_kernel_syms 178:query_module 180:nfsservctl 181:getpmsg
182:putpmsg 183:afs_syscall 184:tuxcall 185:security 186:gettid 187:readahead 188:setxattr
189:lsetxattr 190:fsetxattr 191:getxattr 192:lgetxattr 193:fgetxattr 194:listxattr
195:llistxattr 196:flistxattr 197:removexattr 198:lremovexattr 199:fremovexattr 200:tkill
201:time 202:futex 203:sched_setaffinity 204:sched_getaffinity 205:set_thread_area 206:io_setup
207:io_destroy 208:io_getevents 209:io_submit 210:io_cancel 211:get_thread_area 213:epoll_create
214:epoll_ctl_old 215:epoll_wait_old 216:remap_file_pages 217:getdents64 218:set_tid_address
219:restart_syscall 220:semtimedop 221:fadvise64 222:timer_create 223:timer_settime
224:timer_gettime 225:timer_getoverrun 226:timer_delete 228:clock_gettime 229:clock_getres
230:clock_nanosleep 231:exit_group 232:epoll_wait 233:epoll_ctl 234:tgkill 235:utimes
236:vserver 237:mbind 238:set_mempolicy 239:get_mempolicy 240:mq_open 241:mq_unlink
242:mq_timedsend 243:mq_timedreceive 244:mq_notify 245:mq_getsetattr 247:waitid 251:ioprio_set
252:ioprio_get 253:inotify_init 254:inotify_add_watch 255:inotify_rm_watch 256:migrate_pages
257:openat 258:mkdirat 259:mknodat 260:fchownat 261:futimesat 262:newfstatat 263:unlinkat
264:renameat 265:linkat 266:symlinkat 267:readlinkat 268:fchmodat 269:faccessat 270:pselect6
271:ppoll 272:unshare 273:set_robust_list 274:get_robust_list 275:splice 276:tee
277:sync_file_range 278:vmsplice 279:move_pages 280:utimensat 281:epoll_pwait 282:signalfd
283:timerfd_create 284:eventfd 285:fallocate 286:timerfd_settime 287:timerfd_gettime 288:accept4
289:signalfd4 290:eventfd2 291:epoll_create1 292:dup3 293:pipe2 294:inotify_init1 295:preadv
296:pwritev 297:rt_tgsigqueueinfo 299:recvmmsg 301:fanotify_mark 302:prlimit64 306:syncfs
307:sendmmsg 309:getcpu 314:sched_setattr 315:sched_getattr 316:renameat2 317:seccomp
318:getrandom 322:execveat 324:membarrier 325:mlock2 326:copy_file_range 327:preadv2
328:pwritev2 329:pkey_mprotect 330:pkey_alloc 331:pkey_free 332:statx 333:io_pgetevents 334:rseq
335:uretprobe 336:uprobe 436:close_range 437:openat2 439:faccessat2 441:epoll_pwait2
444:landlock_create_ruleset 445:landlock_add_rule 446:landlock_restrict_self
448:process_mrelease 449:futex_waitv 450:set_mempolicy_home_node 451:cachestat 452:fchmodat2
453:map_shadow_stack 454:futex_wake 455:futex_wait 456:futex_requeue 457:statmount 458:listmount
459:lsm_get_self_attr 460:lsm_set_self_attr 461:lsm_list_modules 462:mseal 463:setxattrat
464:getxattrat 465:listxattrat 466:removexattrat 468:file_getattr 469:file_setattr
";

/// What the proxy may call with arguments of zero; everything else is refused, `clone3` with ENOSYS.
const PROXY: &str = "
0:read 1:write 2:open 3:close 4:stat 5:fstat 6:lstat 7:poll 8:lseek 9:mmap 10:mprotect 11:munmap
12:brk 13:rt_sigaction 14:rt_sigprocmask 15:rt_sigreturn 17:pread64 18:pwrite64 19:readv
20:writev 21:access 22:pipe 23:select 24:sched_yield 25:mremap 27:mincore 28:madvise 32:dup
33:dup2 35:nanosleep 39:getpid 40:sendfile 42:connect 43:accept 44:sendto 45:recvfrom 46:sendmsg
47:recvmsg 48:shutdown 49:bind 50:listen 51:getsockname 52:getpeername 54:setsockopt
55:getsockopt 60:exit 63:uname 72:fcntl 79:getcwd 89:readlink 96:gettimeofday 98:getrusage
99:sysinfo 102:getuid 104:getgid 107:geteuid 108:getegid 110:getppid 118:getresuid 120:getresgid
131:sigaltstack 149:mlock 150:munlock 186:gettid 201:time 202:futex 204:sched_getaffinity
217:getdents64 218:set_tid_address 219:restart_syscall 221:fadvise64 228:clock_gettime
229:clock_getres 230:clock_nanosleep 231:exit_group 232:epoll_wait 233:epoll_ctl 234:tgkill
257:openat 262:newfstatat 267:readlinkat 269:faccessat 270:pselect6 271:ppoll
273:set_robust_list 274:get_robust_list 275:splice 281:epoll_pwait 283:timerfd_create
286:timerfd_settime 287:timerfd_gettime 288:accept4 290:eventfd2 291:epoll_create1 292:dup3
293:pipe2 295:preadv 296:pwritev 299:recvmmsg 302:prlimit64 307:sendmmsg 309:getcpu
318:getrandom 324:membarrier 325:mlock2 332:statx 334:rseq 436:close_range 439:faccessat2
441:epoll_pwait2
";

/// What the supervisor refuses itself from its first moment.
const SUPERVISOR: &str = "
101:ptrace 103:syslog 153:vhangup 159:adjtimex 163:acct 164:settimeofday 167:swapon 168:swapoff
169:reboot 170:sethostname 171:setdomainname 172:iopl 173:ioperm 175:init_module
176:delete_module 179:quotactl 212:lookup_dcookie 227:clock_settime 246:kexec_load 248:add_key
249:request_key 298:perf_event_open 300:fanotify_init 303:name_to_handle_at
304:open_by_handle_at 305:clock_adjtime 310:process_vm_readv 311:process_vm_writev 312:kcmp
313:finit_module 320:kexec_file_load 321:bpf 323:userfaultfd 425:io_uring_setup
426:io_uring_enter 427:io_uring_register 440:process_madvise 443:quotactl_fd
";

/// And what once it is sealed.
const MOUNTS: &str = "
155:pivot_root 165:mount 166:umount2 428:open_tree 429:move_mount 430:fsopen 431:fsconfig
432:fsmount 433:fspick 442:mount_setattr 467:open_tree_attr
";

/// Numbers that no call has.
const UNASSIGNED: std::ops::RangeInclusive<u32> = 337..=423;

/// `number:name` words.
fn numbers(words: &'static str) -> Vec<(u32, &'static str)> {
    let word = |word: &'static str| {
        let (number, name) = word.split_once(':').expect("number:name");
        (number.parse().expect("a number"), name)
    };
    words.split_whitespace().map(word).collect()
}

/// Each call of `x86_64` by name: the lists are complete and without overlap, and say what the
/// filter says. On the other architecture the table is the same, under its own numbers.
#[test]
fn the_agent_over_every_number() {
    let mut expected = std::collections::BTreeMap::new();
    let eperm = refused(libc::EPERM);
    for (words, answer) in [(EPERM, eperm), (ENOSYS, refused(libc::ENOSYS)), (ALLOWED, ALLOW)] {
        for (number, name) in numbers(words) {
            assert!(expected.insert(number, (name, answer)).is_none(), "{name} is listed twice");
        }
    }
    // What no call has is left to the kernel, which has no such call.
    for number in UNASSIGNED {
        assert!(expected.insert(number, ("unassigned", ALLOW)).is_none(), "{number} is listed");
    }
    let program = agent(AgentOptions::default());
    for nr in 0..1024 {
        let answer = run(&program.code, &Call { nr, arch: NATIVE_ARCH, args: [0; 6] }).0;
        if nr > calls::LAST_KNOWN {
            assert!(!expected.contains_key(&nr), "{nr} is above the table's end");
            assert_eq!(answer, refused(libc::ENOSYS), "call {nr}");
        } else {
            let (name, wanted) = expected.get(&nr).unwrap_or_else(|| panic!("{nr} is not listed"));
            assert_eq!(answer, *wanted, "call {nr} ({name})");
        }
    }
    // What is refused is refused whatever the arguments, but for sockets, which have a test.
    for (nr, name) in numbers(EPERM) {
        for args in [[u64::MAX; 6], [GARBAGE; 6], [1, 2, 3, 4, 5, 6], [8; 6], [0x10; 6]] {
            let answer = run(&program.code, &Call { nr, arch: NATIVE_ARCH, args }).0;
            assert!(answer == eperm || name.starts_with("socket"), "{name} {args:x?}");
        }
    }
}

#[test]
fn the_proxy_and_the_supervisor_over_every_number() {
    let eperm = refused(libc::EPERM);
    let set = |words| numbers(words).into_iter().map(|(nr, _)| nr).collect::<BTreeSet<_>>();
    let allowed = set(PROXY);
    let (mut refused_calls, mounts) = (set(SUPERVISOR), set(MOUNTS));
    assert!(allowed.is_disjoint(&refused_calls) && allowed.is_disjoint(&mounts));
    let answers = |program: &Program, expected: &dyn Fn(u32) -> u32| {
        for nr in 0..1024 {
            let answer = run(&program.code, &Call { nr, arch: NATIVE_ARCH, args: [0; 6] }).0;
            let unknown = nr > calls::LAST_KNOWN;
            let expected = if unknown { refused(libc::ENOSYS) } else { expected(nr) };
            assert_eq!(answer, expected, "{program:?} call {nr}");
        }
    };
    let clone3 = u32::try_from(libc::SYS_clone3).unwrap();
    answers(&proxy(), &|nr| match nr {
        nr if allowed.contains(&nr) => ALLOW,
        nr if nr == clone3 => refused(libc::ENOSYS),
        _ => eperm,
    });
    refused_calls.extend(mounts);
    answers(&supervisor(), &|nr| if refused_calls.contains(&nr) { eperm } else { ALLOW });
}

/// The names in the lists are those of the C library, where it has them.
#[test]
fn the_lists_name_the_calls_of_kernel_best_practice() {
    let eperm = numbers(EPERM);
    for (nr, name) in [
        (libc::SYS_add_key, "add_key"),
        (libc::SYS_bpf, "bpf"),
        (libc::SYS_io_uring_enter, "io_uring_enter"),
        (libc::SYS_io_uring_register, "io_uring_register"),
        (libc::SYS_io_uring_setup, "io_uring_setup"),
        (libc::SYS_kcmp, "kcmp"),
        (libc::SYS_keyctl, "keyctl"),
        (libc::SYS_memfd_create, "memfd_create"),
        (libc::SYS_mount_setattr, "mount_setattr"),
        (libc::SYS_move_mount, "move_mount"),
        (libc::SYS_open_by_handle_at, "open_by_handle_at"),
        (libc::SYS_pidfd_getfd, "pidfd_getfd"),
        (libc::SYS_process_madvise, "process_madvise"),
        (libc::SYS_process_vm_readv, "process_vm_readv"),
        (libc::SYS_ptrace, "ptrace"),
        (libc::SYS_request_key, "request_key"),
        (libc::SYS_setns, "setns"),
        (libc::SYS_userfaultfd, "userfaultfd"),
        (467, "open_tree_attr"),
    ] {
        let nr = u32::try_from(nr).unwrap();
        assert!(eperm.contains(&(nr, name)), "{nr} {name}");
    }
}
