//! The wire of Fusebox and nothing else: messages, client and server stubs of `fusebox.v1`, of `Resilience`
//! for callers and of `Admin` for operators.
//!
//! The protos under `proto/protos` are the contract; their comments give unit, range and default of
//! every field. This crate compiles them without a system `protoc`.

/// Package `fusebox.v1`.
pub mod v1 {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("fusebox.v1");
}

/// The encoded descriptors of `fusebox.v1` and all that it imports, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptor");
