//! For tests that need a cluster.
