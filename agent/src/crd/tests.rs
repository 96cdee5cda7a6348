//! Tests of the definitions.
