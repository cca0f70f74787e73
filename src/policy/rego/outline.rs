//! A text as far as it must be understood before it is evaluated: which rules it has, where they
//! stand, and which functions they call.
//!
//! regorus finds out only when a rule comes to it that a function is missing, and never that a
//! function calls itself: it runs out of stack, and the process ends.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};

use serde_json::Value as Json;

/// The package of the contract, as references begin.
const OWN: &str = "data.openshell.sandbox.";

/// What stands in a text.
#[derive(Debug, Default)]
pub(super) struct Outline {
    rules: Vec<Rule>,
}

/// One head with its bodies; a rule has several.
#[derive(Debug)]
struct Rule {
    /// With dots.
    name: String,
    line: u64,
    function: bool,
    calls: Vec<Call>,
}

/// A function that is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Call {
    /// With dots; without the package where it is the text's own.
    pub name: String,
    /// From 1.
    pub line: u64,
}

impl Outline {
    /// Reads regorus's syntax tree of one module.
    pub fn of(module: &Json, text: &str) -> Self {
        let list = |key: &str| module.get(key).and_then(Json::as_array).into_iter().flatten();
        let aliases: HashMap<String, String> =
            list("imports").filter_map(|import| alias(import, text)).collect();
        let rules = list("rules").filter_map(|rule| read(rule, &aliases));
        Self { rules: rules.collect() }
    }

    /// The line of a rule's first head, from 1.
    pub fn line_of(&self, rule: &str) -> Option<u64> {
        self.rules.iter().filter(|known| first(&known.name) == rule).map(|rule| rule.line).min()
    }

    /// Calls of what the text does not define itself, each name once.
    pub fn foreign_calls(&self) -> Vec<&Call> {
        let own: HashSet<_> = self.rules.iter().map(|rule| rule.name.as_str()).collect();
        let mut seen = HashSet::new();
        let calls = self.rules.iter().flat_map(|rule| &rule.calls);
        calls.filter(|call| !own.contains(call.name.as_str()) && seen.insert(&call.name)).collect()
    }

    /// A call by which a function comes to call itself.
    pub fn recursion(&self) -> Option<&Call> {
        let mut calls: HashMap<&str, Vec<&Call>> = HashMap::new();
        for rule in self.rules.iter().filter(|rule| rule.function) {
            calls.entry(&rule.name).or_default().extend(&rule.calls);
        }
        let mut done = HashSet::new();
        for start in calls.keys() {
            // The functions that are being looked at, each with the calls that are left.
            let mut path = vec![(*start, calls[start].iter())];
            while let Some((name, left)) = path.last_mut() {
                let Some(call) = left.next() else {
                    done.insert(*name);
                    path.pop();
                    continue;
                };
                if path.iter().any(|(open, _)| *open == call.name) {
                    return Some(call);
                }
                if !done.contains(call.name.as_str())
                    && let Some((name, next)) = calls.get_key_value(call.name.as_str())
                {
                    path.push((*name, next.iter()));
                }
            }
        }
        None
    }
}

/// What stands before the first dot.
fn first(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

fn alias(import: &Json, text: &str) -> Option<(String, String)> {
    let path = reference(import.get("refr")?)?;
    let written = import.get("as").and_then(|span| {
        let at = |key| usize::try_from(span.get(key)?.as_u64()?).ok();
        text.get(at("start")?..at("end")?)
    });
    let name = written.or_else(|| path.rsplit('.').next()).map(str::to_owned)?;
    Some((name, path))
}

fn read(rule: &Json, aliases: &HashMap<String, String>) -> Option<Rule> {
    let spec = rule.get("Spec");
    let head = match spec {
        Some(spec) => spec.get("head")?.as_object()?.values().next()?,
        None => rule.get("Default")?,
    };
    let whole = spec.or_else(|| rule.get("Default"))?;
    let mut calls = Vec::new();
    collect(whole, aliases, &mut calls);
    Some(Rule {
        name: reference(head.get("refr")?)?,
        line: line(whole),
        function: spec.is_some_and(|spec| spec.pointer("/head/Func").is_some()),
        calls,
    })
}

fn collect(node: &Json, aliases: &HashMap<String, String>, calls: &mut Vec<Call>) {
    match node {
        Json::Array(items) => items.iter().for_each(|item| collect(item, aliases, calls)),
        Json::Object(fields) => {
            if let Some(call) = fields.get("Call")
                && let Some(name) = call.get("fcn").and_then(reference)
            {
                let name = match aliases.get(first(&name)) {
                    Some(path) => format!("{path}{}", &name[first(&name).len()..]),
                    None => name,
                };
                let name = name.strip_prefix(OWN).unwrap_or(&name).to_owned();
                calls.push(Call { name, line: line(call) });
            }
            fields.values().for_each(|value| collect(value, aliases, calls));
        }
        _ => {}
    }
}

/// A reference as it is written with dots; what is in brackets ends it, unless it is a string.
fn reference(node: &Json) -> Option<String> {
    if let Some(name) = node.pointer("/Var/value") {
        return name.as_str().map(str::to_owned);
    }
    if let Some(dot) = node.get("RefDot") {
        let name = dot.pointer("/field/1")?.as_str()?;
        return Some(format!("{}.{name}", reference(dot.get("refr")?)?));
    }
    let bracket = node.get("RefBrack")?;
    let front = reference(bracket.get("refr")?)?;
    match bracket.pointer("/index/String/value").and_then(Json::as_str) {
        Some(name) => Some(format!("{front}.{name}")),
        None => Some(front),
    }
}

fn line(node: &Json) -> u64 {
    node.pointer("/span/line").and_then(Json::as_u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::runner::Runner;

    const HEAD: &str = "package openshell.sandbox\nimport rego.v1\n";

    fn names(text: &str) -> Vec<(String, u64)> {
        let outline = Runner::new(&format!("{HEAD}{text}")).expect(text).outline().expect(text);
        outline.foreign_calls().iter().map(|call| (call.name.clone(), call.line)).collect()
    }

    #[test]
    fn calls_are_found_wherever_they_stand() {
        let text = "import data.openshell.sandbox as own\n# none(x)\nf(x) := 1 if {\n\
                    not g.h(x)\n\ty := \"i(\" \n z := `b(\n)`\n own.f(x) == count(x)\n}\n\
                    e := [n | some n in lib.q(1)] if { data.other.r(1); every k in [1] { s(k) } }\n";
        let found = names(text);
        let found: Vec<_> = found.iter().map(|(name, line)| (name.as_str(), *line)).collect();
        assert_eq!(
            found,
            [("g.h", 6), ("count", 10), ("lib.q", 12), ("data.other.r", 12), ("s", 12)]
        );
    }

    #[test]
    fn rules_have_lines() {
        let text = format!("{HEAD}default allow := false\nallowed := 1\nallow if true\nx.y := 1\n");
        let outline = Runner::new(&text).unwrap().outline().unwrap();
        assert_eq!(outline.line_of("allow"), Some(3));
        assert_eq!(outline.line_of("allowed"), Some(4));
        assert_eq!(outline.line_of("x"), Some(6));
        assert_eq!(outline.line_of("net"), None);
    }

    #[test]
    fn functions_that_come_back_to_themselves_are_found() {
        for (text, found) in [
            ("f(x) := f(x + 1)\n", true),
            ("f(x) := g(x)\ng(x) := h(x)\nh(x) := data.openshell.sandbox.f(x)\n", true),
            ("f(x) := 1 if { y := [f(z) | some z in x] }\n", true),
            ("import data.openshell.sandbox as s\nf(x) := s.f(x)\n", true),
            ("f(x) := g(x)\ng(x) := count(x)\nh(x) := f(g(x))\nf(x) := g(x)\n", false),
        ] {
            let outline = Runner::new(&format!("{HEAD}{text}")).expect(text).outline().expect(text);
            assert_eq!(outline.recursion().is_some(), found, "{text}");
        }
    }
}
