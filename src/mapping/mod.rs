//! A change to its actions: table rules, document id, the handler of an embedder.
