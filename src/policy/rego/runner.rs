//! regorus, bounded: a text and its data go in, the values of its rules come out.
//!
//! An evaluation has a time limit, a panic of the interpreter is an error, and what the text prints
//! is dropped: it could hold what the agent sent. Cloning the prepared engine costs less than a
//! microsecond, so each evaluation has its own and none waits for another.
#![forbid(unsafe_code)]

use std::fmt;
use std::num::NonZeroU32;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use regorus::Engine;
use regorus::utils::limits::ExecutionTimerConfig;
use serde_json::Value as Json;

use super::outline::Outline;
use crate::policy::suggestion::printable;

/// How long the evaluation of one rule may take, before it is tried a second and last time. Long for
/// a rule (they take well below a millisecond), and tried again, because it is time and not work that
/// regorus measures: a container's CPU quota or a busy node may stop the process meanwhile. Without
/// optimisation everything takes several times as long.
const TIME_LIMIT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 5 } else { 1 });
/// regorus's words for it.
pub(super) const OUT_OF_TIME: &str = "exceeded time limit";
/// Steps of the interpreter between two looks at the clock.
const STEPS: NonZeroU32 = NonZeroU32::new(256).unwrap();
/// What the text is called in regorus's messages; the file's own name is not given to it.
const LABEL: &str = "policy.rego";
/// The package of the contract.
const PACKAGE: &str = "data.openshell.sandbox";

/// A text with its data, prepared.
#[derive(Debug, Clone)]
pub(super) struct Runner {
    prepared: Engine,
}

/// Why there is no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// Line and column in the text, from 1.
    pub at: Option<(u64, u64)>,
    /// Printable ASCII, bounded.
    pub what: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.at {
            Some((line, _)) => write!(f, "line {line}: {}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

impl Fault {
    pub fn new(what: impl Into<String>) -> Self {
        Self { at: None, what: what.into() }
    }

    /// regorus shows the line with an arrow; of that only the place and the message are kept.
    fn of(error: &str) -> Self {
        let at = error.split("--> ").nth(1).and_then(|rest| {
            let place = rest.lines().next()?.strip_prefix(LABEL)?.strip_prefix(':')?;
            let (line, column) = place.split_once(':')?;
            Some((line.parse().ok()?, column.parse().ok()?))
        });
        let message = match error.split_once("error: ") {
            Some((_, message)) => message,
            None => error,
        };
        let first = message.lines().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        Self { at, what: printable(first.trim().trim_end_matches(':')) }
    }
}

impl Runner {
    /// Parses a text. The data is empty.
    pub fn new(text: &str) -> Result<Self, Fault> {
        let mut prepared = Engine::new();
        prepared.set_gather_prints(true);
        prepared.set_strict_builtin_errors(true);
        prepared.set_execution_timer_config(ExecutionTimerConfig {
            limit: TIME_LIMIT,
            check_interval: STEPS,
        });
        let added = guarded(|| prepared.add_policy(LABEL.into(), text.into()))
            .map_err(|e| Fault::of(&e))?;
        if added != PACKAGE {
            return Err(Fault::new(format!(
                "the package is {}",
                printable(added.trim_start_matches("data."))
            )));
        }
        Ok(Self { prepared })
    }

    /// Whether a rule of this name is written in the text.
    pub fn declares(&self, rule: &str) -> bool {
        self.prepared.has_declared_rule_rooted_at(LABEL, rule).unwrap_or(false)
    }

    /// What stands in the text.
    pub fn outline(&self) -> Result<Outline, Fault> {
        let tree = guarded(|| self.prepared.get_ast_as_json()).map_err(|e| Fault::of(&e))?;
        let tree: Json = serde_json::from_str(&tree)
            .map_err(|_| Fault::new("an expression is nested too deep"))?;
        let module = tree.get(0).ok_or_else(|| Fault::new("the text has no rules"))?;
        let text = module.pointer("/source/contents").and_then(Json::as_str).unwrap_or_default();
        Ok(module.get("ast").map(|ast| Outline::of(ast, text)).unwrap_or_default())
    }

    /// Puts other data in the place of the present one.
    pub fn set_data(&mut self, data: &Json) -> Result<(), Fault> {
        self.prepared.clear_data();
        let added = guarded(|| self.prepared.add_data(regorus::Value::from(data.clone())));
        added.map_err(|e| Fault::of(&e))?;
        // What is analysed once is analysed before it is cloned.
        self.prepared.set_input(regorus::Value::new_object());
        guarded(|| self.prepared.eval_rule(format!("{PACKAGE}.filesystem_policy")))
            .map(drop)
            .map_err(|e| Fault::of(&e))
    }

    /// Begins an evaluation.
    pub fn ask(&self, input: &Json) -> Asking {
        let mut engine = self.prepared.clone();
        engine.set_input(regorus::Value::from(input.clone()));
        Asking { engine }
    }
}

/// Questions with one input.
pub(super) struct Asking {
    engine: Engine,
}

impl Asking {
    /// The value of a rule; `None` where it is undefined. A rule that is not there is an error.
    pub fn rule(&mut self, name: &str) -> Result<Option<Json>, Fault> {
        let mut evaluate = || guarded(|| self.engine.eval_rule(format!("{PACKAGE}.{name}")));
        let value = match evaluate() {
            Err(error) if error.contains(OUT_OF_TIME) => evaluate(),
            first => first,
        };
        let value = value.map_err(|error| Fault::of(&error))?;
        if value == regorus::Value::Undefined {
            return Ok(None);
        }
        serde_json::to_value(&value).map(Some).map_err(|e| Fault::new(printable(&e.to_string())))
    }
}

/// Whether regorus has a function of this name. Those that are missing are found by regorus only
/// when a rule calls them.
pub(super) fn has_function(name: &str) -> bool {
    let text = format!("package p\nimport rego.v1\nx if {{ {name}() }}\n");
    let mut engine = Engine::new();
    let asked = guarded(|| {
        engine.add_policy(LABEL.into(), text)?;
        engine.eval_rule("data.p.x".into())
    });
    !asked.is_err_and(|error| error.contains("could not find function"))
}

/// A panic of the interpreter is an error like others: the decision is a no.
fn guarded<T, E: fmt::Display>(evaluate: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(evaluate)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the interpreter gave up".into()),
    }
}
