//! The local document store: an HTTP server that speaks the part of Elasticsearch's API that pgtide uses.
