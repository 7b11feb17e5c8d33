//! Searches that are more than one request: scrolls and points in time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::catalog::Catalog;
use super::failure::Failure;
use super::index::{Index, random_id, time_value};
use super::search::{Found, Search, Shape, View, write_answer};

/// Scrolls and points in time.
#[derive(Default)]
pub(super) struct Contexts {
    open: Mutex<HashMap<String, Context>>,
}

struct Context {
    until: Instant,
    kind: ContextKind,
}

enum ContextKind {
    Point(Arc<View>),
    Scroll(Arc<Mutex<Scroll>>),
}

struct Scroll {
    rest: std::vec::IntoIter<Found>,
    total: usize,
    size: usize,
    shape: Shape,
}

fn missing(id: &str) -> Failure {
    let id: String = id.chars().take(64).collect();
    Failure::new(404, "search_context_missing_exception", format!("No search context found for id [{id}]"))
}

fn keep_alive(text: Option<&str>) -> Result<Duration, Failure> {
    let text = text.unwrap_or("5m");
    time_value(text)
        .ok_or_else(|| Failure::argument(format!("failed to parse setting [keep_alive] with value [{text}]")))
}

impl Contexts {
    fn open(&self) -> MutexGuard<'_, HashMap<String, Context>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        open.retain(|_, context| context.until > now);
        open
    }

    /// `POST /{index}/_pit?keep_alive=`.
    pub(super) fn open_point(&self, indices: Vec<Arc<Index>>, keep: Option<&str>) -> Result<Value, Failure> {
        let Some(keep) = keep else { return Err(Failure::validation("[keep_alive] is not specified")) };
        let until = Instant::now() + keep_alive(Some(keep))?;
        let view = Arc::new(View::of(indices, None)?);
        let id = random_id(40);
        self.open().insert(id.clone(), Context { until, kind: ContextKind::Point(view) });
        Ok(json!({ "id": id, "_shards": { "total": 1, "successful": 1, "skipped": 0, "failed": 0 } }))
    }

    /// Closes scrolls or points; says how many there were.
    pub(super) fn close(&self, ids: &[String]) -> usize {
        let mut open = self.open();
        if ids == ["_all"] {
            return std::mem::take(&mut *open).len();
        }
        ids.iter().filter(|id| open.remove(*id).is_some()).count()
    }

    /// `_search` on `expression` (empty: all indices, unless the body names a point in time).
    pub(super) fn search(
        &self,
        catalog: &Catalog,
        expression: &str,
        body: &Value,
        params: &HashMap<String, String>,
    ) -> Result<String, Failure> {
        let scroll = params.get("scroll").map(String::as_str);
        let mut search = Search::parse(body, params, scroll.is_some())?;
        if let Some(pit) = body.get("pit") {
            if !expression.is_empty() {
                return Err(Failure::validation(
                    "[indices] cannot be used with point in time. Do not specify any index with point in time.",
                ));
            }
            let id = pit.get("id").and_then(Value::as_str).unwrap_or_default();
            let keep = pit.get("keep_alive").and_then(Value::as_str);
            let view = self.point(id, keep)?;
            return Self::answer(search, &view, Some(("pit_id", id)));
        }
        let ignore = params.get("ignore_unavailable").is_some_and(|value| value != "false");
        let expression = if expression.is_empty() { "_all" } else { expression };
        let view = View::of(catalog.resolve(expression, ignore)?, Some(&search.query))?;
        let Some(scroll) = scroll else { return Self::answer(search, &view, None) };
        if search.size == 0 || search.from > 0 {
            return Err(Failure::validation("[size] cannot be [0] and [from] cannot be used in a scroll context"));
        }
        let until = Instant::now() + keep_alive(Some(scroll))?;
        let size = std::mem::replace(&mut search.size, usize::MAX);
        let (hits, total, _) = search.run(&view)?;
        let scroll = Scroll { rest: hits.into_iter(), total, size, shape: search.shape };
        let id = random_id(40);
        let scroll = Arc::new(Mutex::new(scroll));
        self.open().insert(id.clone(), Context { until, kind: ContextKind::Scroll(Arc::clone(&scroll)) });
        Ok(next_page(&scroll, &id))
    }

    /// `_search/scroll`.
    pub(super) fn scroll(&self, id: &str, keep: Option<&str>) -> Result<String, Failure> {
        let extend = keep.map(|keep| keep_alive(Some(keep))).transpose()?;
        let scroll = {
            let mut open = self.open();
            let context = open.get_mut(id).ok_or_else(|| missing(id))?;
            if let Some(extend) = extend {
                context.until = Instant::now() + extend;
            }
            match &context.kind {
                ContextKind::Scroll(scroll) => Arc::clone(scroll),
                ContextKind::Point(_) => return Err(missing(id)),
            }
        };
        Ok(next_page(&scroll, id))
    }

    fn point(&self, id: &str, keep: Option<&str>) -> Result<Arc<View>, Failure> {
        let mut open = self.open();
        let context = open.get_mut(id).ok_or_else(|| missing(id))?;
        if keep.is_some() {
            context.until = Instant::now() + keep_alive(keep)?;
        }
        match &context.kind {
            ContextKind::Point(view) => Ok(Arc::clone(view)),
            ContextKind::Scroll(_) => Err(missing(id)),
        }
    }

    fn answer(mut search: Search, view: &View, id: Option<(&str, &str)>) -> Result<String, Failure> {
        if id.is_some() {
            search.in_point();
        }
        let (hits, total, more) = search.run(view)?;
        let total = (search.track != Some(0)).then_some((total, more));
        Ok(write_answer(&hits, total, &search.shape, id))
    }
}

fn next_page(scroll: &Mutex<Scroll>, id: &str) -> String {
    let mut scroll = scroll.lock().unwrap_or_else(PoisonError::into_inner);
    let size = scroll.size;
    let hits: Vec<Found> = scroll.rest.by_ref().take(size).collect();
    write_answer(&hits, Some((scroll.total, false)), &scroll.shape, Some(("_scroll_id", id)))
}
