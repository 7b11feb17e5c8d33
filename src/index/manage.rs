//! Looking at indices, creating them, and changing those of ours.

use reqwest::Method;
use serde_json::{Map, Value, json};

use super::compare::{Difference, compare};
use super::{FIELDS, MARK, Mark, Plan, Product, fields};
use crate::config::JsonAs;
use crate::postgres::column_types::ColumnType;
use crate::sink::{Answer, Client, Content, SinkError};
use crate::table::TableId;

/// The longest name that Elasticsearch takes, in bytes.
const LONGEST_NAME: usize = 255;
/// What a copy into an index that nobody searches yet can do without: each refresh writes a segment, and each replica
/// does all of the work again.
const WHILE_COPYING: [(&str, &str); 2] = [("index.refresh_interval", "-1"), ("index.number_of_replicas", "0")];

/// The indices of one pipeline.
pub struct Indices<'a> {
    client: &'a Client,
    product: Product,
    json_as: JsonAs,
    job: String,
}

/// An index that is there.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its own name, never an alias.
    pub index: String,
    /// Its mapping, as Elasticsearch shows it.
    pub mappings: Value,
    settings: Map<String, Value>,
    mark: Option<Mark>,
}

impl Found {
    #[cfg(test)]
    pub(super) fn new(index: &str, mappings: Value) -> Self {
        Self { index: index.to_owned(), mark: None, mappings, settings: Map::new() }
    }

    /// The pipeline that made it; none where it was made by something else, which is never changed.
    #[must_use]
    pub fn job(&self) -> Option<&str> {
        self.mark.as_ref().map(|mark| mark.job.as_str())
    }

    /// A first copy goes into it, or was cut short: settings are still to be put back.
    #[must_use]
    pub fn copies(&self) -> bool {
        self.mark.as_ref().is_some_and(|mark| mark.settings_before_copy.is_some())
    }
}

impl<'a> Indices<'a> {
    /// Those of `job`.
    #[must_use]
    pub fn new(client: &'a Client, product: Product, job: &str, json_as: JsonAs) -> Self {
        Self { client, product, json_as, job: job.to_owned() }
    }

    /// The index that a table with these columns should have under `name`.
    #[must_use]
    pub fn plan(&self, table: &TableId, name: &str, columns: &[ColumnType]) -> Plan {
        Plan::new(table.clone(), name, &self.product, self.json_as, columns)
    }

    /// What `found` has otherwise than the plan. A field that stands in for a type that a cluster does not have is none of it.
    #[must_use]
    pub fn compare(&self, found: &Found, plan: &Plan, columns: &[ColumnType]) -> Vec<Difference> {
        let poor = Plan::new(plan.table.clone(), &plan.name, &self.product.poorest(), self.json_as, columns);
        let poor = compare(&poor, &found.mappings);
        let mut differences = compare(plan, &found.mappings);
        differences.retain(|one| poor.iter().any(|other| other.column == one.column));
        differences
    }

    /// The index of this name, or those behind the alias; none where there is no such thing.
    ///
    /// # Errors
    /// No answer, or any refusal but 404.
    pub async fn find(&self, name: &str) -> Result<Vec<Found>, SinkError> {
        let answer = self.client.send(Method::GET, &[name], &[("flat_settings", "true")], Content::Empty).await?;
        match answer.status {
            200 => {}
            404 => return Ok(Vec::new()),
            _ => return Err(answer.into_error()),
        }
        let indices: Map<String, Value> = answer.json()?;
        let found = |(index, mut body): (String, Value)| {
            let mappings = body["mappings"].take();
            let settings = body["settings"].as_object().cloned().unwrap_or_default();
            Found { index, mark: Mark::of(&mappings), mappings, settings }
        };
        Ok(indices.into_iter().map(found).collect())
    }

    /// The same where there has to be one and no more: that is the one that documents go to.
    ///
    /// # Errors
    /// As [`Indices::find`].
    pub async fn find_one(&self, name: &str) -> Result<Option<Found>, SinkError> {
        let mut found = self.find(name).await?;
        Ok(found.pop().filter(|_| found.is_empty()))
    }

    /// Creates the index of a table, with the name as its alias. Field types that the cluster does not have are done without.
    /// Gives the plan as it was carried out, and the index's name.
    ///
    /// # Errors
    /// No answer, or it is refused.
    pub async fn create(
        &mut self,
        table: &TableId,
        name: &str,
        columns: &[ColumnType],
    ) -> Result<(Plan, String), SinkError> {
        let mut number = 1;
        loop {
            let plan = self.plan(table, name, columns);
            let (mut index, mut body) = (plan.index(number), plan.body(&self.job));
            if index.len() > LONGEST_NAME {
                index = name.to_owned();
                body["aliases"] = json!({});
            }
            let answer = self.client.send(Method::PUT, &[&index], &[], Content::Json(body.to_string().into())).await?;
            let text = String::from_utf8_lossy(&answer.body);
            match answer.status {
                200..=299 => return Ok((plan, index)),
                // One that lost its alias: it stays as it is.
                400 if text.contains("resource_already_exists_exception") && index != name => number += 1,
                400 if self.product.learn(&text) => {}
                _ => return Err(answer.into_error()),
            }
        }
    }

    /// Adds the fields that the table's columns want and an index of ours does not have. Gives those added, and the
    /// columns whose field is of another type, which no index can change.
    ///
    /// # Errors
    /// No answer, or it is refused.
    pub async fn extend(
        &mut self,
        found: &Found,
        table: &TableId,
        name: &str,
        columns: &[ColumnType],
    ) -> Result<(Vec<String>, Vec<Difference>), SinkError> {
        loop {
            let plan = self.plan(table, name, columns);
            let (lacking, misfits): (Vec<_>, Vec<_>) =
                self.compare(found, &plan, columns).into_iter().partition(|difference| difference.found.is_none());
            let added: Vec<String> = lacking.into_iter().map(|difference| difference.column).collect();
            if added.is_empty() {
                return Ok((added, misfits));
            }
            let mut fields = plan.fields.clone();
            fields.retain(|(column, ..)| added.contains(column));
            let addition = Plan { fields, ..plan };
            let properties = addition.properties();
            let had = found.mappings["properties"].as_object().map_or(0, fields::count);
            let needed = had + fields::count(&properties);
            let limit = found.settings.get("index.mapping.total_fields.limit").and_then(Value::as_str);
            if needed > limit.and_then(|limit| limit.parse().ok()).unwrap_or(FIELDS) {
                let limit = (needed / FIELDS + 2) * FIELDS;
                self.set(&found.index, &json!({ "index.mapping.total_fields.limit": limit })).await?;
            }
            let answer = self.put(&[&found.index, "_mapping"], &json!({ "properties": properties })).await?;
            match answer.status {
                200..=299 => return Ok((added, misfits)),
                400 if self.product.learn(&String::from_utf8_lossy(&answer.body)) => {}
                _ => return Err(answer.into_error()),
            }
        }
    }

    /// Makes a new index ready for its first copy: no refresh, no replicas. What they were is written down in it before.
    /// Only for an index that nobody searches yet.
    ///
    /// # Errors
    /// No answer, or it is refused. [`Indices::restore`] is right whatever was done.
    pub async fn hurry(&self, found: &Found) -> Result<(), SinkError> {
        let Some(mark) = &found.mark else { return Ok(()) };
        let before = WHILE_COPYING
            .iter()
            .map(|(setting, _)| ((*setting).to_owned(), found.settings.get(*setting).cloned().unwrap_or(Value::Null)));
        self.mark(found, &Mark { settings_before_copy: Some(before.collect()), ..mark.clone() }).await?;
        let settings: Map<String, Value> =
            WHILE_COPYING.iter().map(|(setting, value)| ((*setting).to_owned(), json!(value))).collect();
        self.set(&found.index, &Value::Object(settings)).await
    }

    /// Puts back what [`Indices::hurry`] changed, if it did in an index of this pipeline, and makes its documents visible.
    /// Whether there was something to do.
    ///
    /// # Errors
    /// No answer, or it is refused; it is to be done again.
    pub async fn restore(&self, found: &Found) -> Result<bool, SinkError> {
        let Some(mark) = found.mark.as_ref().filter(|mark| mark.job == self.job) else { return Ok(false) };
        let Some(before) = &mark.settings_before_copy else { return Ok(false) };
        self.set(&found.index, &Value::Object(before.clone())).await?;
        self.client.refresh(&found.index).await?;
        self.mark(found, &Mark { settings_before_copy: None, ..mark.clone() }).await?;
        Ok(true)
    }

    /// Writes `mark`; what others keep in `_meta` stays.
    async fn mark(&self, found: &Found, mark: &Mark) -> Result<(), SinkError> {
        let mut meta = found.mappings["_meta"].as_object().cloned().unwrap_or_default();
        meta.insert(MARK.to_owned(), mark.json());
        accepted(self.put(&[&found.index, "_mapping"], &json!({ "_meta": meta })).await?)
    }

    async fn set(&self, index: &str, settings: &Value) -> Result<(), SinkError> {
        accepted(self.put(&[index, "_settings"], settings).await?)
    }

    async fn put(&self, path: &[&str], body: &Value) -> Result<Answer, SinkError> {
        self.client.send(Method::PUT, path, &[], Content::Json(body.to_string().into())).await
    }
}

fn accepted(answer: Answer) -> Result<(), SinkError> {
    match answer.status {
        200..=299 => Ok(()),
        _ => Err(answer.into_error()),
    }
}
