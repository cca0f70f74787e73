//! The supervisor as a program, on this kernel: real namespaces, a real TLS server, real curl.
//!
//! Needs root. Runs itself again in a network and a mount namespace of its own, so that nothing of
//! the machine is touched: the upstream listens on 10.77.0.1 of the test's loopback, `/etc/hosts`
//! is the test's, and `/run` is empty.
//!
//! A word on the command line runs the tests whose name contains it. `RINGFENCE_SOAK=1000,200`
//! makes the soak as long as that: so many starts in a row, so many supervisors killed while they
//! start.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

mod admin;
mod asked;
mod basics;
mod direct;
mod enter;
mod ipv6;
mod life;
mod live;
mod many;
mod openshell;
mod rego;
mod rig;
mod sidecars;
mod volumes;

use rig::Rig;

const INSIDE: &str = "RINGFENCE_TEST_INSIDE";

fn main() {
    if !is_root() {
        println!("SKIPPED: tests/supervisor needs root");
        println!("0 passed, 0 failed");
        return;
    }
    if std::env::var_os(INSIDE).is_none() {
        let this = std::env::current_exe().unwrap();
        let error = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "--"])
            .arg(this)
            .args(std::env::args_os().skip(1))
            .env(INSIDE, "1")
            .exec();
        panic!("cannot run unshare(1): {error}");
    }
    let rig = Rig::new();
    let only = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let (mut passed, mut failed) = (0, 0);
    for (name, test) in TESTS {
        if only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&rig)));
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        *if outcome.is_ok() { &mut passed } else { &mut failed } += 1;
    }
    println!("{passed} passed, {failed} failed");
    // What is left over would hold the temporary directory.
    drop(rig);
    std::process::exit(i32::from(failed > 0));
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

type Test = (&'static str, fn(&Rig));
const TESTS: &[Test] = &[
    ("the_agents_exit_code_is_ours", basics::exit_codes),
    ("the_agent_is_nobody_special", basics::identity),
    ("an_allowed_request_passes", basics::allowed),
    ("a_policy_for_every_program_lets_them_pass", basics::for_anyone),
    ("what_is_not_allowed_is_refused_with_its_reason", basics::refused),
    ("a_connection_round_the_proxy_is_refused_at_once", basics::direct),
    ("programs_that_ignore_the_proxy_reach_what_is_allowed", direct::allowed),
    ("python_and_node_need_no_proxy_variables", direct::other_programs),
    ("programs_that_ignore_the_proxy_reach_nothing_else", direct::denied),
    ("the_resolver_of_the_container_is_answered", direct::dns),
    ("capture_can_be_switched_off", direct::switched_off),
    ("a_pod_of_ipv6_only", ipv6::pod_of_ipv6_only),
    ("the_agent_cannot_climb_out", basics::escapes),
    ("what_an_agent_linked_is_not_opened_to_the_next", basics::planted_link),
    ("a_port_of_the_agent_is_reachable", basics::inbound),
    ("broken_input_is_named", basics::broken_input),
    ("the_agents_certificates_are_the_images_and_ours", basics::certificates),
    ("files_of_the_image_that_never_end_do_not_hold_the_start", basics::image_files),
    ("every_signal_reaches_the_agent", life::signals),
    ("every_end_has_its_code", life::codes),
    ("stop_is_bounded", life::bounded_stop),
    ("orphans_are_reaped_and_nobody_waits_for_them", life::orphans),
    ("orphans_are_reaped_by_pid_1", life::orphans_of_pid_1),
    ("nothing_outlives_the_supervisor", life::supervisor_killed),
    ("nothing_outlives_the_proxy", life::proxy_killed),
    ("nothing_outlives_the_keeper", life::keeper_killed),
    ("every_thread_of_the_proxy_is_locked", life::proxy_threads),
    ("enter_runs_inside", enter::enter),
    ("enter_passes_stdin_and_codes", enter::stdin_and_codes),
    ("enter_passes_signals", enter::signals),
    ("enter_gives_a_terminal_of_its_own", enter::terminal),
    ("enter_waits_for_the_fence", enter::waits),
    ("enter_names_several_supervisors", enter::several),
    ("enter_never_runs_outside", enter::enter_without_fence),
    ("an_agent_that_stops_what_enters_stops_nobody_else", enter::stopped_child),
    ("the_supervisor_serves_while_a_child_stands", enter::served_meanwhile),
    ("openshells_command_line_works", openshell::command_line),
    ("openshells_exit_codes_are_kept", openshell::exit_codes),
    ("openshells_environment_is_kept", openshell::environment),
    ("openshells_log_lines_come_in_order", openshell::log_lines),
    ("openshells_copy_self_works", openshell::copy_self),
    ("both_wrapper_scripts_work_unchanged", openshell::wrappers),
    ("a_limit_of_processes_can_be_required", openshell::process_limit),
    ("memfd_and_limits_are_the_policys", asked::memfd_and_limits),
    ("a_limit_that_cannot_be_set_is_named", asked::limit_too_high),
    ("sockets_in_volumes_are_listed_or_refused", asked::sockets),
    ("without_setpcap_it_works_and_says_so", asked::without_setpcap),
    ("a_pinned_binary_is_another_when_its_content_is", asked::pinned),
    ("a_tainted_binary_is_refused", asked::tainted),
    ("the_authors_variables_stay_and_are_listed", asked::authors_variables),
    ("a_policy_rego_of_ones_own_decides", rego::decides),
    ("a_broken_policy_rego_is_named", rego::broken),
    ("a_policy_that_changes_is_followed", live::follows),
    ("a_change_that_cannot_be_followed_keeps_the_last_policy", live::keeps_the_last),
    ("what_is_fixed_at_the_start_stays_and_nothing_is_gained_by_it", live::what_is_fixed),
    ("a_policy_that_comes_to_name_binaries_knows_them", live::binaries_are_known),
    ("the_admin_endpoint_is_ready_and_attests", admin::ready_and_attested),
    ("the_admin_endpoint_is_out_of_the_agents_reach", admin::out_of_the_agents_reach),
    ("the_admin_endpoint_may_be_off_or_taken", admin::off_or_taken),
    ("sidecars_are_reached_under_the_policy_and_by_nobody_else", sidecars::all),
    ("volumes_join_where_they_may", volumes::all),
    ("a_runners_agents_have_what_its_namespace_says", openshell::options),
    ("twenty_at_once_and_nothing_left", many::at_once),
    ("many_in_a_row_and_many_killed_leave_nothing", many::soak),
];
