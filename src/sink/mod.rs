//! The Elasticsearch side: bulk bodies, their order, their answers.
