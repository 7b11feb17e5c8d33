//! Cutting a table into chunks.
//!
//! By ctid: a range of pages costs nothing to plan, is read in the order of the disk, and needs no key. Or, where the
//! configuration asks for `integer_range`, by the table's key. Either way the first range of a table has no beginning
//! and the last no end, so that every row of the snapshot is in exactly one of them, whatever the estimates were.

use tokio_postgres::Client;

use crate::postgres::catalog::{Leaf, TableInfo};
use crate::problem::Problem;
use crate::table::{TableId, quote_identifier};

/// Rows that a page is taken to hold while PostgreSQL has no estimate, as the reference takes it.
const ROWS_PER_PAGE: u64 = 100;

/// Pages that are looked at for each range by key, and at least in all: enough for ranges of about the same size.
const SAMPLED_PAGES: (u64, u64) = (4, 1_000);

/// `pg_type.oid` of int8, int2 and int4.
const INTEGERS: [u32; 3] = [20, 21, 23];

/// A part of the rows of one leaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// The table that holds the rows.
    pub leaf: TableId,
    /// That table's filenode when it was planned.
    pub filenode: u32,
    /// Which of its rows.
    pub bounds: Bounds,
}

/// Where a range begins and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounds {
    /// `ctid_block`.
    Pages {
        /// First page.
        start: u64,
        /// The page after the last; none for the last range of the leaf, which has no end.
        end: Option<u64>,
    },
    /// `integer_range`: values of the only column of the key.
    Keys {
        /// The first; none for the first range, which has no beginning.
        start: Option<i64>,
        /// The last, itself included; none for the last range, which has no end.
        end: Option<i64>,
    },
}

impl Bounds {
    /// The rows, as a condition. `key` is the name of the key's column.
    ///
    /// ```
    /// # use pgtide::snapshot::Bounds;
    /// assert_eq!(Bounds::Pages { start: 8, end: Some(16) }.condition("id"), "ctid >= '(8,0)' AND ctid < '(16,0)'");
    /// assert_eq!(Bounds::Pages { start: 8, end: None }.condition("id"), "ctid >= '(8,0)'");
    /// assert_eq!(Bounds::Keys { start: Some(-5), end: Some(9) }.condition("id"), "\"id\" >= -5 AND \"id\" <= 9");
    /// assert_eq!(Bounds::Keys { start: None, end: None }.condition("id"), "TRUE");
    /// ```
    #[must_use]
    pub fn condition(&self, key: &str) -> String {
        match *self {
            Self::Pages { start, end: Some(end) } => format!("ctid >= '({start},0)' AND ctid < '({end},0)'"),
            Self::Pages { start, end: None } => format!("ctid >= '({start},0)'"),
            Self::Keys { start, end } => {
                let key = quote_identifier(key);
                // The smallest bigint cannot be written as a number: its minus sign is an operator.
                let from = start.map(|start| format!("{key} >= {}", literal(start)));
                let to = end.map(|end| format!("{key} <= {}", literal(end)));
                let both: Vec<String> = from.into_iter().chain(to).collect();
                if both.is_empty() { "TRUE".to_owned() } else { both.join(" AND ") }
            }
        }
    }

    /// It is the last of its leaf.
    #[must_use]
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Pages { end: None, .. } | Self::Keys { end: None, .. })
    }
}

fn literal(number: i64) -> String {
    if number == i64::MIN { format!("'{number}'::bigint") } else { number.to_string() }
}

/// The column by which a table can be cut into ranges of integers: its key has no other.
#[must_use]
pub fn integer_key(info: &TableInfo) -> Option<&str> {
    let mut key = info.columns.iter().filter(|column| column.key);
    let only = key.next().filter(|column| INTEGERS.contains(&column.type_oid))?;
    key.next().is_none().then_some(only.name.as_str())
}

/// The ranges of a table by ctid, at least one per leaf, each of about `chunk_rows` rows.
#[must_use]
pub fn by_pages(leaves: &[Leaf], chunk_rows: u64) -> Vec<Range> {
    let mut ranges = Vec::new();
    for leaf in leaves {
        let rows_per_page = match leaf.rows {
            Some(rows) if leaf.pages > 0 => (rows / leaf.pages).max(1),
            _ => ROWS_PER_PAGE,
        };
        let step = (chunk_rows / rows_per_page).max(1);
        let mut start = 0;
        loop {
            let next = start + step;
            let end = (next < leaf.pages).then_some(next);
            ranges.push(range(leaf, Bounds::Pages { start, end }));
            match end {
                Some(end) => start = end,
                None => break,
            }
        }
    }
    ranges
}

/// The ranges of a table by its key, a column of integers: at least one per leaf, each of about `chunk_rows` rows by a
/// sample of the keys, so that gaps and crowds in them cost nothing.
///
/// # Errors
/// A query fails.
pub async fn by_key(client: &Client, leaves: &[Leaf], key: &str, chunk_rows: u64) -> Result<Vec<Range>, Problem> {
    let mut ranges = Vec::new();
    for leaf in leaves {
        let rows = leaf.rows.unwrap_or(leaf.pages * ROWS_PER_PAGE).max(1);
        let chunks = rows.div_ceil(chunk_rows.max(1));
        let mut keys = Vec::new();
        if chunks > 1 {
            let pages = (chunks * SAMPLED_PAGES.0).max(SAMPLED_PAGES.1);
            #[allow(clippy::cast_precision_loss, reason = "an estimate")]
            let percent = (100.0 * pages as f64 / leaf.pages.max(1) as f64).min(100.0);
            // One key of each page: the keys of a page are neighbours in most tables, and would make ranges of one page.
            let sql = format!(
                "SELECT (array_agg({}))[1]::int8 FROM ONLY {} TABLESAMPLE SYSTEM ({percent}) REPEATABLE (0)
                 GROUP BY (ctid::text::point)[0] ORDER BY 1",
                quote_identifier(key),
                leaf.id.quoted()
            );
            keys = client.query(&sql, &[]).await?.iter().map(|row| row.get(0)).collect();
        }
        ranges.extend(quantiles(&keys, chunks).into_iter().map(|bounds| range(leaf, bounds)));
    }
    Ok(ranges)
}

/// About `chunks` ranges that hold as many of the sorted `keys` each.
fn quantiles(keys: &[i64], chunks: u64) -> Vec<Bounds> {
    let chunks = usize::try_from(chunks).unwrap_or(usize::MAX).clamp(1, keys.len().max(1));
    // Where a range begins, except for the first, which has no beginning.
    let mut starts: Vec<i64> = (1..chunks).map(|chunk| keys[chunk * keys.len() / chunks]).collect();
    starts.dedup();
    starts.retain(|start| *start > i64::MIN);
    let ends = starts.iter().map(|start| Some(start - 1)).chain([None]);
    let starts = [None].into_iter().chain(starts.iter().copied().map(Some));
    starts.zip(ends).map(|(start, end)| Bounds::Keys { start, end }).collect()
}

fn range(leaf: &Leaf, bounds: Bounds) -> Range {
    Range { leaf: leaf.id.clone(), filenode: leaf.filenode, bounds }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaf(pages: u64, rows: Option<u64>) -> Leaf {
        Leaf { id: TableId::new("public", "t"), oid: 1, filenode: 1, pages, rows }
    }

    #[test]
    fn ranges_cover_every_page_once_and_the_last_has_no_end() {
        for (pages, rows, chunk) in
            [(0, None, 10), (1, Some(5), 10), (100, Some(8_000), 1_000), (7, None, 1), (9, Some(0), 5)]
        {
            let mut next = Some(0);
            for range in by_pages(&[leaf(pages, rows)], chunk) {
                let Bounds::Pages { start, end } = range.bounds else { panic!("{range:?}") };
                assert_eq!(Some(start), next);
                assert!(end.is_none_or(|end| start < end && end < pages), "{range:?}");
                next = end;
            }
            assert_eq!(next, None);
        }
        assert_eq!(by_pages(&[leaf(100, Some(8_000))], 1_000).len(), 9);
        assert_eq!(by_pages(&[leaf(0, None), leaf(0, None)], 10).len(), 2);
    }

    proptest! {
        #[test]
        fn every_integer_is_in_one_range(
            mut keys in prop::collection::vec(prop_oneof![any::<i64>(), -3..3_i64, Just(i64::MIN), Just(i64::MAX)], 0..80),
            chunks in 0..40_u64,
            probes in prop::collection::vec(any::<i64>(), 0..20),
        ) {
            keys.sort_unstable();
            let ranges = quantiles(&keys, chunks);
            prop_assert!(ranges.len() as u64 <= chunks.max(1));
            for key in keys.iter().chain(&probes).chain(&[i64::MIN, i64::MAX]) {
                let holds = |bounds: &&Bounds| match bounds {
                    Bounds::Keys { start, end } => start.is_none_or(|start| start <= *key) && end.is_none_or(|end| *key <= end),
                    Bounds::Pages { .. } => false,
                };
                prop_assert_eq!(ranges.iter().filter(holds).count(), 1, "{} in {:?}", key, ranges);
            }
            prop_assert!(ranges.last().is_some_and(Bounds::is_last));
        }
    }

    #[test]
    fn crowded_keys_make_ranges_of_one_size() {
        let keys: Vec<i64> = (0..100).chain([1 << 40, 1 << 62]).collect();
        let ranges = quantiles(&keys, 4);
        assert_eq!(ranges[1], Bounds::Keys { start: Some(25), end: Some(50) });
        assert_eq!(ranges.len(), 4);
    }
}
