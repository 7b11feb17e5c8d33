//! The stream: transactions to actions, and what may be acknowledged.
