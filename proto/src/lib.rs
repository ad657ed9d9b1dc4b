//! The wire of Fusebox and nothing else: messages, client and server stubs of `fusebox.v1`, of `Resilience`
//! for callers and of `Admin` for operators; and of Envoy's rate limit service.
//!
//! The protos under `proto/protos` are the contract; their comments give unit, range and default of
//! every field. This crate compiles them without a system `protoc`.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod entry;

pub use self::entry::Entry;

/// Package `fusebox.v1`.
pub mod v1 {
    #![allow(missing_docs, clippy::all, clippy::pedantic)]
    tonic::include_proto!("fusebox.v1");
}

/// Envoy's packages, as far as its rate limit service needs them.
pub mod envoy {
    /// Package `envoy.service`.
    pub mod service {
        /// Package `envoy.service.ratelimit`.
        pub mod ratelimit {
            /// Package `envoy.service.ratelimit.v3`.
            pub mod v3 {
                #![allow(missing_docs, clippy::all, clippy::pedantic)]
                tonic::include_proto!("envoy.service.ratelimit.v3");
            }
        }
    }

    /// Package `envoy.extensions`.
    pub mod extensions {
        /// Package `envoy.extensions.common`.
        pub mod common {
            /// Package `envoy.extensions.common.ratelimit`.
            pub mod ratelimit {
                /// Package `envoy.extensions.common.ratelimit.v3`.
                pub mod v3 {
                    #![allow(missing_docs, clippy::all, clippy::pedantic)]
                    tonic::include_proto!("envoy.extensions.common.ratelimit.v3");
                }
            }
        }
    }

    /// Package `envoy.config`.
    pub mod config {
        /// Package `envoy.config.core`.
        pub mod core {
            /// Package `envoy.config.core.v3`.
            pub mod v3 {
                #![allow(missing_docs, clippy::all, clippy::pedantic)]
                tonic::include_proto!("envoy.config.core.v3");
            }
        }
    }

    /// Package `envoy.type`.
    pub mod r#type {
        /// Package `envoy.type.v3`.
        pub mod v3 {
            #![allow(missing_docs, clippy::all, clippy::pedantic)]
            tonic::include_proto!("envoy.r#type.v3");
        }
    }
}

/// The encoded descriptors of all packages and what they import, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptor");
