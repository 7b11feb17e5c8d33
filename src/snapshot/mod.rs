//! The copy: chunks, ledger, keeper, workers.
