//! Which indices and aliases there are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use serde_json::{Map, Value, json};

use super::failure::Failure;
use super::fields::{Mapping, merge};
use super::filter_path::glob;
use super::index::{Index, Meta};

/// The indices and aliases, under one lock. Documents have locks of their own, one per index.
#[derive(Default)]
pub(super) struct Catalog {
    names: RwLock<Names>,
}

#[derive(Default)]
struct Names {
    indices: BTreeMap<String, Arc<Index>>,
    /// Alias to index to what was said about the pair.
    aliases: BTreeMap<String, BTreeMap<String, Alias>>,
}

/// An alias of one index.
#[derive(Clone, Debug, Default, PartialEq)]
struct Alias {
    is_write: Option<bool>,
}

impl Alias {
    fn json(&self) -> Value {
        match self.is_write {
            Some(is_write) => json!({ "is_write_index": is_write }),
            None => json!({}),
        }
    }
}

impl Catalog {
    fn read(&self) -> RwLockReadGuard<'_, Names> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Names> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes an index from the body of `PUT /{index}`.
    pub(super) fn create(&self, name: &str, body: &Value) -> Result<Arc<Index>, Failure> {
        check_name(name)?;
        if let Some(key) =
            body.as_object().and_then(|body| body.keys().find(|key| !CREATE_KEYS.contains(&key.as_str())))
        {
            return Err(Failure::new(400, "parse_exception", format!("unknown key [{key}] for create index")));
        }
        let mut settings = BTreeMap::new();
        apply_settings(&mut settings, body.get("settings").unwrap_or(&Value::Null))?;
        let mut mapping_json = json!({});
        if let Some(mappings) = body.get("mappings") {
            merge(&mut mapping_json, mappings)?;
        }
        let mapping = Arc::new(Mapping::parse(&mapping_json)?);
        let mut names = self.write();
        if let Some(index) = names.indices.get(name) {
            let reason = format!("index [{name}/{}] already exists", index.uuid);
            return Err(Failure::new(400, "resource_already_exists_exception", reason).of(index));
        }
        if names.aliases.contains_key(name) {
            let reason = format!("Invalid index name [{name}], already exists as alias");
            return Err(Failure::new(400, "invalid_index_name_exception", reason).about(name));
        }
        for (alias, options) in body.get("aliases").and_then(Value::as_object).into_iter().flatten() {
            names.aliases.entry(alias.clone()).or_default().insert(name.to_owned(), alias_of(options));
        }
        let index = Arc::new(Index::new(name, Meta { settings, mapping_json, mapping, closed: false }));
        names.indices.insert(name.to_owned(), Arc::clone(&index));
        Ok(index)
    }

    /// Removes the indices that `expression` names. An alias is refused, as in Elasticsearch.
    pub(super) fn delete(&self, expression: &str, ignore_unavailable: bool) -> Result<(), Failure> {
        let mut names = self.write();
        if let Some(alias) = expression.split(',').find(|name| names.aliases.contains_key(*name)) {
            return Err(Failure::argument(format!(
                "The provided expression [{alias}] matches an alias, specify the corresponding concrete indices instead."
            )));
        }
        for index in names.resolve(expression, ignore_unavailable)? {
            names.indices.remove(&index.name);
            for pairs in names.aliases.values_mut() {
                pairs.remove(&index.name);
            }
        }
        names.aliases.retain(|_, pairs| !pairs.is_empty());
        Ok(())
    }

    /// The indices that `expression` names: names, aliases, `*`, `_all`, comma separated. In the order of their names.
    pub(super) fn resolve(&self, expression: &str, ignore_unavailable: bool) -> Result<Vec<Arc<Index>>, Failure> {
        self.read().resolve(expression, ignore_unavailable)
    }

    /// The index that a write to `name` goes to; made if need be and `create` allows it.
    pub(super) fn write_target(&self, name: &str, create: bool, require_alias: bool) -> Result<Arc<Index>, Failure> {
        {
            let names = self.read();
            if let Some(pairs) = names.aliases.get(name) {
                let explicit = pairs.iter().find(|(_, alias)| alias.is_write == Some(true));
                let only = pairs.iter().next().filter(|(_, alias)| pairs.len() == 1 && alias.is_write != Some(false));
                let target = explicit.or(only).and_then(|(index, _)| names.indices.get(index));
                return target.cloned().ok_or_else(|| {
                    Failure::argument(format!(
                        "no write index is defined for alias [{name}]. The write index may be explicitly disabled using is_write_index=false or the alias points to multiple indices without one being designated as a write index"
                    ))
                });
            }
            if require_alias {
                return Err(Failure {
                    reason: format!(
                        "no such index [{name}] and [require_alias] request flag is [true] and [{name}] is not an alias"
                    ),
                    ..Failure::no_index(name)
                });
            }
            if let Some(index) = names.indices.get(name) {
                return Ok(Arc::clone(index));
            }
        }
        if !create {
            return Err(Failure::no_index(name));
        }
        match self.create(name, &Value::Null) {
            // Another request was quicker.
            Err(failure) if failure.kind == "resource_already_exists_exception" => {
                self.read().indices.get(name).cloned().ok_or_else(|| Failure::no_index(name))
            }
            created => created,
        }
    }

    /// `POST /_aliases`: all of its actions or none.
    pub(super) fn update_aliases(&self, body: &Value) -> Result<(), Failure> {
        let Some(actions) = body.get("actions").and_then(Value::as_array) else {
            return Err(Failure::validation("Must specify at least one action"));
        };
        let mut names = self.write();
        let mut aliases = names.aliases.clone();
        let mut removed = BTreeSet::new();
        for action in actions {
            let Some((verb, options)) = action.as_object().and_then(|action| action.iter().next()) else {
                return Err(Failure::parsing(
                    "an alias action must be an object with one of [add], [remove], [remove_index]",
                ));
            };
            let index_names = one_or_many(options, "index", "indices");
            let alias_names = one_or_many(options, "alias", "aliases");
            let indices = names.resolve(&index_names.join(","), false)?;
            match verb.as_str() {
                "add" => {
                    for alias in &alias_names {
                        check_name(alias)?;
                        if names.indices.contains_key(alias) && !removed.contains(alias) {
                            return Err(Failure::new(
                                400,
                                "invalid_alias_name_exception",
                                format!(
                                    "Invalid alias name [{alias}]: an index or data stream exists with the same name as the alias"
                                ),
                            ));
                        }
                        let pairs = aliases.entry(alias.clone()).or_default();
                        pairs.extend(indices.iter().map(|index| (index.name.clone(), alias_of(options))));
                        if pairs.values().filter(|alias| alias.is_write == Some(true)).count() > 1 {
                            return Err(Failure::new(
                                400,
                                "illegal_state_exception",
                                format!("alias [{alias}] has more than one write index"),
                            ));
                        }
                    }
                }
                "remove" => {
                    let mut found = false;
                    for (_, pairs) in aliases.iter_mut().filter(|(name, _)| alias_names.iter().any(|p| glob(p, name))) {
                        for index in &indices {
                            found |= pairs.remove(&index.name).is_some();
                        }
                    }
                    if !found && options.get("must_exist") != Some(&Value::Bool(false)) {
                        let reason = format!("aliases [{}] missing", alias_names.join(","));
                        return Err(Failure::new(404, "aliases_not_found_exception", reason));
                    }
                }
                "remove_index" => removed.extend(indices.iter().map(|index| index.name.clone())),
                other => return Err(Failure::parsing(format!("[aliases] unknown field [{other}]"))),
            }
        }
        for pairs in aliases.values_mut() {
            pairs.retain(|index, _| !removed.contains(index));
        }
        aliases.retain(|_, pairs| !pairs.is_empty());
        names.aliases = aliases;
        names.indices.retain(|name, _| !removed.contains(name));
        Ok(())
    }

    /// The aliases of an index, as they stand in answers.
    pub(super) fn aliases_of(&self, index: &str) -> Map<String, Value> {
        let names = self.read();
        let pairs = names.aliases.iter().filter_map(|(alias, pairs)| Some((alias, pairs.get(index)?)));
        pairs.map(|(alias, options)| (alias.clone(), options.json())).collect()
    }

    /// Whether `name` is an alias.
    pub(super) fn is_alias(&self, name: &str) -> bool {
        self.read().aliases.contains_key(name)
    }
}

impl Names {
    fn resolve(&self, expression: &str, ignore_unavailable: bool) -> Result<Vec<Arc<Index>>, Failure> {
        let mut found = BTreeMap::new();
        for name in expression.split(',').filter(|name| !name.is_empty()) {
            if name == "_all" || name.contains('*') {
                let pattern = if name == "_all" { "*" } else { name };
                found.extend(self.indices.iter().filter(|(name, _)| glob(pattern, name)));
                let behind = self.aliases.iter().filter(|(alias, _)| pattern != "*" && glob(pattern, alias));
                found.extend(behind.flat_map(|(_, pairs)| pairs.keys()).filter_map(|n| self.indices.get_key_value(n)));
            } else if let Some(pairs) = self.aliases.get(name) {
                found.extend(pairs.keys().filter_map(|name| self.indices.get_key_value(name)));
            } else if let Some((name, index)) = self.indices.get_key_value(name) {
                found.insert(name, index);
            } else if !ignore_unavailable {
                return Err(Failure::no_index(name));
            }
        }
        Ok(found.into_values().map(Arc::clone).collect())
    }
}

const CREATE_KEYS: [&str; 3] = ["settings", "mappings", "aliases"];

fn alias_of(options: &Value) -> Alias {
    Alias { is_write: options.get("is_write_index").and_then(Value::as_bool) }
}

fn one_or_many(options: &Value, one: &str, many: &str) -> Vec<String> {
    match options.get(one).or_else(|| options.get(many)) {
        Some(Value::String(name)) => vec![name.clone()],
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}

fn check_name(name: &str) -> Result<(), Failure> {
    let refuse = |why: &str| {
        Err(Failure::new(400, "invalid_index_name_exception", format!("Invalid index name [{name}], {why}"))
            .about(name))
    };
    if name.chars().any(char::is_uppercase) {
        return refuse("must be lowercase");
    }
    if name.is_empty() || name == "." || name == ".." {
        return refuse("must not be empty, '.' or '..'");
    }
    if name.starts_with(['_', '-', '+']) {
        return refuse("must not start with '_', '-', or '+'");
    }
    if name.contains(['\\', '/', '*', '?', '"', '<', '>', '|', ' ', ',', '#', ':'])
        || name.chars().any(char::is_control)
    {
        return refuse("must not contain the following characters ['\\','/','*','?','\"','<','>','|',' ',',','#',':']");
    }
    if name.len() > 255 {
        return refuse("index name is too long");
    }
    Ok(())
}

/// Adds what `json` says to the flat `settings`; null takes a setting away.
pub(super) fn apply_settings(settings: &mut BTreeMap<String, String>, json: &Value) -> Result<(), Failure> {
    let mut flat = Vec::new();
    flatten(json, String::new(), &mut flat);
    for (name, value) in flat {
        let name = if name.starts_with("index.") { name } else { format!("index.{name}") };
        if name == "index.gc_deletes"
            && let Some(text) = &value
            && text != "-1"
            && super::index::time_value(text).is_none()
        {
            return Err(Failure::argument(format!(
                "failed to parse setting [index.gc_deletes] with value [{text}] as a time value: unit is missing or unrecognized"
            )));
        }
        match value {
            Some(value) => settings.insert(name, value),
            None => settings.remove(&name),
        };
    }
    Ok(())
}

fn flatten(json: &Value, path: String, out: &mut Vec<(String, Option<String>)>) {
    match json {
        Value::Object(members) => {
            for (name, value) in members {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                flatten(value, path, out);
            }
        }
        _ if path.is_empty() => {}
        Value::Null => out.push((path, None)),
        Value::String(text) => out.push((path, Some(text.clone()))),
        other => out.push((path, Some(other.to_string()))),
    }
}

/// The flat settings as nested objects, as answers have them.
pub(super) fn nest(settings: &BTreeMap<String, String>) -> Value {
    let mut root = Map::new();
    for (name, value) in settings {
        let mut at = &mut root;
        let mut parts = name.split('.').peekable();
        while let Some(part) = parts.next() {
            if parts.peek().is_none() {
                at.insert(part.to_owned(), json!(value));
                break;
            }
            let below = at.entry(part).or_insert_with(|| json!({}));
            if !below.is_object() {
                *below = json!({});
            }
            let Value::Object(below) = below else { break };
            at = below;
        }
    }
    Value::Object(root)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn names(indices: &[Arc<Index>]) -> Vec<&str> {
        indices.iter().map(|index| index.name.as_str()).collect()
    }

    #[test]
    fn resolves_names_aliases_and_patterns() {
        let catalog = Catalog::default();
        catalog.create("a-1", &json!({"aliases": {"a": {}}})).unwrap();
        catalog.create("a-2", &Value::Null).unwrap();
        assert_eq!(names(&catalog.resolve("a", false).unwrap()), ["a-1"]);
        assert_eq!(names(&catalog.resolve("a-*,a", false).unwrap()), ["a-1", "a-2"]);
        assert_eq!(catalog.resolve("b", false).err().unwrap().kind, "index_not_found_exception");
        assert!(catalog.resolve("b", true).unwrap().is_empty());
        assert_eq!(catalog.create("a", &Value::Null).err().unwrap().kind, "invalid_index_name_exception");
        assert_eq!(catalog.create("a-1", &Value::Null).err().unwrap().kind, "resource_already_exists_exception");
        assert_eq!(catalog.create("A", &Value::Null).err().unwrap().status, 400);
    }

    #[test]
    fn an_alias_swap_is_all_or_nothing() {
        let catalog = Catalog::default();
        catalog.create("v1", &json!({"aliases": {"t": {}}})).unwrap();
        catalog.create("v2", &Value::Null).unwrap();
        let swap = |from: &str, to: &str| {
            catalog.update_aliases(&json!({"actions": [
                {"remove": {"index": from, "alias": "t"}}, {"add": {"index": to, "alias": "t"}}]}))
        };
        assert_eq!(swap("v1", "v9").unwrap_err().kind, "index_not_found_exception");
        assert_eq!(names(&catalog.resolve("t", false).unwrap()), ["v1"]);
        swap("v1", "v2").unwrap();
        assert_eq!(names(&catalog.resolve("t", false).unwrap()), ["v2"]);
        assert_eq!(catalog.write_target("t", false, true).unwrap().name, "v2");
        assert_eq!(swap("v1", "v2").unwrap_err().kind, "aliases_not_found_exception");
    }

    #[test]
    fn an_alias_of_two_indices_needs_a_write_index() {
        let catalog = Catalog::default();
        catalog.create("v1", &json!({"aliases": {"t": {}}})).unwrap();
        catalog.create("v2", &json!({"aliases": {"t": {}}})).unwrap();
        assert!(catalog.write_target("t", true, false).err().unwrap().reason.starts_with("no write index"));
        catalog
            .update_aliases(&json!({"actions": [{"add": {"index": "v2", "alias": "t", "is_write_index": true}}]}))
            .unwrap();
        assert_eq!(catalog.write_target("t", true, false).unwrap().name, "v2");
        assert!(catalog.write_target("v1", true, true).err().unwrap().reason.contains("require_alias"));
    }

    #[test]
    fn settings_are_flat_inside_and_nested_outside() {
        let mut settings = BTreeMap::new();
        apply_settings(
            &mut settings,
            &json!({"index": {"gc_deletes": "1s"}, "number_of_replicas": 0, "index.blocks.write": true}),
        )
        .unwrap();
        assert_eq!(
            nest(&settings),
            json!({"index": {"gc_deletes": "1s", "number_of_replicas": "0", "blocks": {"write": "true"}}})
        );
        apply_settings(&mut settings, &json!({"index.blocks.write": null})).unwrap();
        assert!(!settings.contains_key("index.blocks.write"));
        assert!(apply_settings(&mut settings, &json!({"gc_deletes": "soon"})).is_err());
    }
}
