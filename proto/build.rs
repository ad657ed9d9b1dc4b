//! Compiles the protos in pure Rust, and keeps the descriptors for reflection.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=protos");
    let out = PathBuf::from(env::var("OUT_DIR")?);

    let mut compiler = protox::Compiler::new(["protos"])?;
    compiler.include_imports(true).include_source_info(true).open_files([
        "fusebox/v1/resilience.proto",
        "fusebox/v1/admin.proto",
        "envoy/service/ratelimit/v3/rls.proto",
    ])?;
    // Encoded by protox itself: through prost's own types custom options would be lost.
    fs::write(out.join("descriptor.bin"), compiler.encode_file_descriptor_set())?;

    tonic_prost_build::configure()
        .build_transport(false)
        // Decoded by hand: it must not fail by what a header holds.
        .extern_path(
            ".envoy.extensions.common.ratelimit.v3.RateLimitDescriptor.Entry",
            "crate::Entry",
        )
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}
