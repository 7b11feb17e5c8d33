//! The external versions of documents: which operation on a document is the newer one.
//!
//! A version holds the position of the commit and the place of the operation in its transaction, so that Elasticsearch
//! drops what comes late: a request that an older process sent, one that was given up after its timeout and is
//! carried out all the same, a copied row behind a change of it. Versions are `long`s above 0 there.
//!
//! ```text
//! bit 63   62 ................................ 12   11 ....... 0
//!   0      position of the commit, in units of 8    place (float)
//! ```
//!
//! PostgreSQL aligns records of the log to 8 bytes, so that nothing is lost of the position. The place has 12 bits for up
//! to 2^38 operations: exact for the first 256, then with 8 significant bits. Of two operations so close together that
//! they share a place the later request counts, and one lane sends them in their order.

use crate::lsn::Lsn;
use crate::problem::{Problem, ProblemKind};

const PLACE_BITS: u32 = 12;
const SIGNIFICANT_BITS: u32 = 8;
const ALIGNMENT_BITS: u32 = 3;
/// The first position that no version has room for: 16 PiB of log.
const END: Lsn = Lsn(1 << (63 - PLACE_BITS + ALIGNMENT_BITS));

/// The version of what a transaction's operation writes, counted from 0 in the order of the transaction. It is the same
/// whenever and by whomever that transaction is applied, rises within it, and rises from commit to commit.
///
/// ```
/// use pgtide::lsn::Lsn;
/// use pgtide::version;
/// let (commit, next) = (Lsn(0x16_B374_D848), Lsn(0x16_B374_D870));
/// assert!(version::of(commit, 0) < version::of(commit, 1));
/// assert!(version::of(commit, u64::MAX) < version::before(next));
/// assert_eq!(version::position(version::of(commit, 7)), commit);
/// ```
#[inline]
#[must_use]
pub const fn of(commit: Lsn, operation: u64) -> u64 {
    base(commit) | place(operation)
}

/// The version of a row that a snapshot at `position` saw: above every operation that was committed before it, below every
/// one that commits there or later.
#[must_use]
pub const fn before(position: Lsn) -> u64 {
    base(position).saturating_sub(1)
}

/// The position that a version was made from: of the commit, or the unit of 8 bytes before the snapshot's.
#[must_use]
pub const fn position(version: u64) -> Lsn {
    Lsn(version >> PLACE_BITS << ALIGNMENT_BITS)
}

/// Makes sure that versions have room for what is written from `position` on.
///
/// # Errors
/// The server has written 16 PiB of log.
pub fn check(position: Lsn) -> Result<(), Problem> {
    if position < END {
        return Ok(());
    }
    Err(Problem::new(
        ProblemKind::Setup,
        format!("the server's log is at {position}, beyond what versions of documents have room for ({END})"),
        "Move the database to a new cluster by pg_dump or logical replication, and copy the tables from there.",
    ))
}

const fn base(position: Lsn) -> u64 {
    position.0 >> ALIGNMENT_BITS << PLACE_BITS
}

/// A floating-point number of 12 bits: 8 significant ones, of which the first is not written once there is an exponent.
#[inline]
const fn place(operation: u64) -> u64 {
    let length = u64::BITS - operation.leading_zeros();
    if length <= SIGNIFICANT_BITS {
        return operation;
    }
    let exponent = length - SIGNIFICANT_BITS;
    // The leading bit of the significand adds 1 to the exponent's field, which begins at 0 without it.
    let place = ((exponent as u64) << (SIGNIFICANT_BITS - 1)) + (operation >> exponent);
    let most = (1 << PLACE_BITS) - 1;
    if place > most { most } else { place }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_rise_without_a_gap_and_never_fall() {
        let mut last = place(0);
        assert_eq!(last, 0);
        for operation in 1..100_000 {
            let next = place(operation);
            assert!(next == last || next == last + 1, "{operation}: {last} {next}");
            assert!(operation >= 256 || next == operation);
            last = next;
        }
        for bits in 17..64 {
            let (low, high) = (place((1 << bits) - 1), place(1 << bits));
            assert!(low < high || high == 4095, "{bits}: {low} {high}");
        }
        assert!(place((1 << 38) - 1) < 4096 && place(u64::MAX) == 4095);
        assert_ne!(place(1 << 37), 4095, "room for a transaction of so many rows");
    }

    #[test]
    fn every_operation_of_a_commit_lies_between_the_snapshots_around_it() {
        for lsn in [8, 0x1538700, 0x16_B374_D848, END.0 - 8] {
            let (here, next) = (Lsn(lsn), Lsn(lsn + 8));
            for operation in [0, 1, 300, 1 << 20, u64::MAX] {
                let version = of(here, operation);
                assert!(before(here) < version && version <= before(next), "{lsn} {operation}");
                assert!(i64::try_from(version).is_ok_and(|version| version > 0));
                assert_eq!(position(version), here);
            }
        }
        assert!(check(Lsn(END.0 - 1)).is_ok());
        assert!(check(END).is_err_and(|problem| problem.message.contains("400000/0")));
    }
}
