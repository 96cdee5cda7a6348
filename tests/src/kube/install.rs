//! Outgate installed in the lab's cluster.
