//! Cutting a table into chunks.
//!
//! By ctid: a range of pages costs nothing to plan, is read in the order of the disk, and needs no key. The first
//! range starts at page 0 and the last has no end, so that every row of the snapshot is in exactly one of them,
//! whatever the size was estimated at.

use crate::postgres::catalog::Leaf;
use crate::table::TableId;

/// Rows that a page is taken to hold while PostgreSQL has no estimate, as the reference takes it.
const ROWS_PER_PAGE: u64 = 100;

/// A range of pages of one leaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// The table that holds the rows.
    pub leaf: TableId,
    /// That table's filenode when it was planned.
    pub filenode: u32,
    /// First page.
    pub start: u64,
    /// The page after the last; none for the last range of the leaf, which has no end.
    pub end: Option<u64>,
}

impl Range {
    /// The rows of the range, as a condition.
    ///
    /// ```
    /// # use pgtide::{snapshot::Range, table::TableId};
    /// let mut range = Range { leaf: TableId::new("public", "users"), filenode: 1, start: 8, end: Some(16) };
    /// assert_eq!(range.condition(), "ctid >= '(8,0)' AND ctid < '(16,0)'");
    /// range.end = None;
    /// assert_eq!(range.condition(), "ctid >= '(8,0)'");
    /// ```
    #[must_use]
    pub fn condition(&self) -> String {
        match self.end {
            Some(end) => format!("ctid >= '({},0)' AND ctid < '({end},0)'", self.start),
            None => format!("ctid >= '({},0)'", self.start),
        }
    }
}

/// The ranges of a table, at least one per leaf, each of about `chunk_rows` rows.
#[must_use]
pub fn plan(leaves: &[Leaf], chunk_rows: u64) -> Vec<Range> {
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
            ranges.push(Range { leaf: leaf.id.clone(), filenode: leaf.filenode, start, end });
            match end {
                Some(end) => start = end,
                None => break,
            }
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(pages: u64, rows: Option<u64>) -> Leaf {
        Leaf { id: TableId::new("public", "t"), oid: 1, filenode: 1, pages, rows }
    }

    #[test]
    fn ranges_cover_every_page_once_and_the_last_has_no_end() {
        for (pages, rows, chunk) in
            [(0, None, 10), (1, Some(5), 10), (100, Some(8_000), 1_000), (7, None, 1), (9, Some(0), 5)]
        {
            let ranges = plan(&[leaf(pages, rows)], chunk);
            assert_eq!(ranges[0].start, 0);
            assert!(ranges.windows(2).all(|pair| pair[0].end == Some(pair[1].start)), "{ranges:?}");
            assert_eq!(ranges.last().and_then(|range| range.end), None);
            assert!(ranges.iter().all(|range| range.end.is_none_or(|end| end < pages)));
        }
        assert_eq!(plan(&[leaf(100, Some(8_000))], 1_000).len(), 9);
        assert_eq!(plan(&[leaf(0, None), leaf(0, None)], 10).len(), 2);
    }
}
