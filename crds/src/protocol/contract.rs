//! What the operator asks of a trainer container: environment, files, ports, exit codes. Any image that keeps to it can
//! take the place of ours (`docs/trainer-contract.md`).

/// Variable with the number of the attempt, from 1. It fences checkpoints: when a newer attempt has committed, an older
/// one must not.
pub const ENV_ATTEMPT: &str = "GROWTH_ATTEMPT";
/// Variable with the path of the file that the [`super::Outcome`] is written to, at most [`MAX_OUTCOME_BYTES`].
pub const ENV_OUTCOME_FILE: &str = "GROWTH_OUTCOME_FILE";
/// Variable with the address that rank 0 serves `/progress`, `/metrics` and `/healthz` on.
pub const ENV_LISTEN: &str = "GROWTH_LISTEN";
/// Variable with the number of trainer pods.
pub const ENV_REPLICAS: &str = "GROWTH_REPLICAS";
/// Variable with the name that leads to rank 0, for rendezvous on [`RENDEZVOUS_PORT`].
pub const ENV_LEADER: &str = "GROWTH_LEADER";
/// Variable with the rank of a pod, from 0; Kubernetes sets it in the pods of an Indexed Job.
pub const ENV_RANK: &str = "JOB_COMPLETION_INDEX";

/// Where the job and the plan of the stage are mounted.
pub const PLAN_FOLDER: &str = "/etc/growth";
/// The whole job, for data preparation.
pub const JOB_FILE: &str = "job.json";
/// The [`crate::StagePlan`] of the stage.
pub const PLAN_FILE: &str = "plan.json";

/// Port of `/progress`, `/metrics` and `/healthz`.
pub const PROGRESS_PORT: u16 = 8080;

/// Port on which rank 0 expects the other ranks.
pub const RENDEZVOUS_PORT: u16 = 29500;

/// What Kubernetes keeps of a termination message.
pub const MAX_OUTCOME_BYTES: usize = 4096;

/// The work is done, or was stopped by SIGTERM after a checkpoint: the outcome tells which.
pub const EXIT_OK: u8 = 0;
/// Something failed that another attempt may get over.
pub const EXIT_FAILED: u8 = 1;
/// The job or its files are at fault: another attempt cannot help.
pub const EXIT_BAD_INPUT: u8 = 2;
/// Another rank ended or fell silent: the fault is elsewhere, and what that pod says counts.
pub const EXIT_PEER_LOST: u8 = 3;
