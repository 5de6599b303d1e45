# The images of this project.
#
#   docker build --target growth-trainer --tag growth-trainer .
#
# The first stage compiles static programs and lays out one root file system per image; each image is one of them and
# nothing else: no shell, no package manager, no libc. `cargo run --release -p growth-tests --bin images` builds the
# same images offline, from the programs that cargo has built on this machine in place of the first stage.
ARG RUST_VERSION=1.95

FROM rust:${RUST_VERSION}-bookworm AS build
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo run --release --locked -p growth-tests --bin images -- --stage /rootfs

FROM scratch AS growth-operator
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="growth-operator" \
      org.opencontainers.image.description="Runs GrowthTrainingJobs on Kubernetes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /rootfs/growth-operator/ /
USER 65532:65532
ENTRYPOINT ["/usr/bin/growth-operator"]

FROM scratch AS growth-trainer
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="growth-trainer" \
      org.opencontainers.image.description="Trains, grows and goes on training LLaMA models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /rootfs/growth-trainer/ /
# Without a name, so that Kubernetes can check runAsNonRoot.
USER 65532:65532
ENTRYPOINT ["/usr/bin/growth-trainer"]
