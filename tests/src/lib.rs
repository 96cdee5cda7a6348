//! The lab: nodes, pods and outside hosts as network namespaces on this machine.
