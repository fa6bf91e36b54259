# An image that holds tf, certificates and nothing else: no shell, no terraform.
#
#     docker build --tag tf .
#
# Terraform is what you run, so which one is yours to say. An image of your own with it:
#
#     FROM tf
#     # 1.x is any version from 0.15.
#     COPY --from=hashicorp/terraform:1.x /bin/terraform /usr/bin/terraform
#
# Its `local-exec` and its modules from git need a shell and git: then start from an image that has them, and take tf alone,
# which is static: COPY --from=tf /usr/bin/tf /usr/bin/tf
#
# `package/check-image` reads the last stage line by line and tries it, so keep it to what that script knows: COPY from the
# stage `build`, ENV, WORKDIR, USER, ENTRYPOINT.

# A tag and no digest: where this was written no registry could be asked for one.
FROM rust:1.95.0-bookworm AS build
WORKDIR /tf
COPY . .
# The history is not copied. It would only tell the time of files, and the binary has none, and the commit:
# docker build --build-arg TF_COMMIT=$(git rev-parse HEAD) --tag tf .
ARG SOURCE_DATE_EPOCH=0
ARG TF_COMMIT=
RUN package/build && package/image-files /image

FROM scratch
COPY --from=build /image/root/ /
# What the user may write: its home, where the journal of runs is, and the directory that is mounted over.
COPY --from=build --chown=65532:65532 /image/own/ /
ENV HOME=/home/tf PATH=/usr/bin
WORKDIR /work
USER 65532:65532
ENTRYPOINT ["/usr/bin/tf"]
