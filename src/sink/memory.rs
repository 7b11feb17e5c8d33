//! Documents that a node has no memory for, however long one waits.
//!
//! A node refuses (429) what would bring the operations that it works on beyond `indexing_pressure.memory.limit`, a tenth
//! of its heap by default. Mostly others fill it, and it passes. Elasticsearch 9 counts the longest document of a request
//! four times besides the request itself (seen on 9.5.3), so that one of 11 MB never gets into a heap of 512 MB.

/// What the node counts for an operation beyond its lines in the body, at most, index and id included.
const AROUND_ITEM: u64 = 2048;

/// Whether a rejection for this reason would come for these `items` in a body of `bytes` again, with nothing else on the
/// node. No reason that is not understood says so.
pub(super) fn is_too_large(reason: &str, bytes: usize, items: usize) -> bool {
    let Some(wanted) = wanted(reason) else { return false };
    if wanted.operation > wanted.limit {
        return true;
    }
    // Where the node that took the request also works on it, the request is among what is there already. When it is all
    // that is there, nobody is waited for.
    let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
    wanted.others.is_some_and(|there| {
        there.abs_diff(count(bytes)) <= AROUND_ITEM.saturating_mul(count(items))
            && there.saturating_add(wanted.operation) > wanted.limit
    })
}

/// The figures of a rejection.
struct Wanted {
    /// Bytes that the node would have to hold for it.
    operation: u64,
    /// Bytes that it holds at most.
    limit: u64,
    /// Bytes that it held already, where it says so.
    others: Option<u64>,
}

fn wanted(reason: &str) -> Option<Wanted> {
    if let Some(text) = reason.strip_prefix("Request contains an operation of size [") {
        let (operation, text) = text.split_once("] bytes, which exceeds the maximum allowed limit of [")?;
        let limit = text.strip_suffix("] bytes")?;
        return Some(Wanted { operation: operation.parse().ok()?, limit: limit.parse().ok()?, others: None });
    }
    let (stage, figures) =
        reason.strip_prefix("rejected execution of ")?.strip_suffix(']')?.split_once("operation [")?;
    let (mut operation, mut limit, mut others) = (None, None, None);
    for figure in figures.split(", ") {
        let (name, value) = figure.split_once('=')?;
        let value = value.parse().ok()?;
        let known = match name {
            "all_bytes" => &mut others,
            "operation_bytes" | "coordinating_operation_bytes" | "primary_operation_bytes" => &mut operation,
            "max_coordinating_bytes" | "max_primary_bytes" | "max_coordinating_and_primary_bytes" => &mut limit,
            _ => continue,
        };
        if known.replace(value).is_some() {
            return None;
        }
    }
    // Before that stage the request itself is not counted.
    Some(Wanted { operation: operation?, limit: limit?, others: others.filter(|_| stage == "primary ") })
}
