//! Condition types and their reasons: a stable interface that scripts wait on. Conditions are never removed.

use std::fmt;

/// Most conditions a status may hold.
pub const MAX_CONDITIONS: usize = 16;

macro_rules! words {
    ($(#[$attribute:meta])* $name:ident { $($(#[doc = $doc:literal])* $variant:ident,)* }) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $($(#[doc = $doc])* $variant,)*
        }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The word in the object.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }

            /// What it means: the text beside its definition.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),*).trim_start(),)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.pad(self.as_str())
            }
        }
    };
}

words! {
    /// Types of conditions.
    ConditionType {
        /// The spec can be carried out.
        Accepted,
        /// The job holds no pods because it is to be suspended.
        Suspended,
        /// All pods of the attempt have a node.
        PodsScheduled,
        /// The trainers, or a growth step, are at work.
        Running,
        /// Steps advance.
        Progressing,
        /// There is a committed checkpoint to go on from.
        CheckpointAvailable,
        /// An elastic stage is to have another number of pods than it has. The time since it is True is that of
        /// elastic.scaleUpDelaySeconds.
        Scaling,
        /// An elastic stage trains on fewer pods than it should, for want of nodes.
        Degraded,
        /// All stages are complete. Final.
        Complete,
        /// The job ended without finishing. Final.
        Failed,
    }
}

words! {
    /// Reasons of conditions.
    Reason {
        /// Accepted: the spec is valid.
        Valid,
        /// Not accepted: the spec cannot be resolved; the message names the field.
        InvalidSpec,
        /// Not accepted: the API server refuses the pods that the template describes.
        InvalidTemplate,
        /// Suspended, or not running for that reason.
        Suspended,
        /// No longer suspended.
        Resumed,
        /// All pods have a node.
        AllPodsScheduled,
        /// The queue has not admitted the attempt.
        WaitingForQuota,
        /// The queue took the quota back.
        QuotaEvicted,
        /// The scheduler finds no node; the message is its own.
        Unschedulable,
        /// Nodes are being added.
        WaitingForNodes,
        /// Pods of the attempt before still end.
        WaitingForPodsTermination,
        /// All trainers are ready.
        TrainersReady,
        /// A growth step is at work.
        TransformRunning,
        /// One stage has ended and the next has not begun.
        StageTransition,
        /// Another job has not trained the first stage yet (spec.stages[0].trainedBy).
        WaitingForJob,
        /// Pods are starting.
        PodsStarting,
        /// An image cannot be pulled.
        ImagePullFailed,
        /// An attempt ended and the next one is being prepared.
        Restarting,
        /// The job has ended.
        Finished,
        /// Steps advance.
        StepsAdvancing,
        /// No step has finished for progressDeadlineSeconds.
        Stalled,
        /// The trainer has not reported yet.
        NotReported,
        /// A checkpoint is committed.
        Committed,
        /// None has been written yet.
        NoCheckpointYet,
        /// A larger size is wanted; the stage restarts with it once it was wanted for elastic.scaleUpDelaySeconds.
        ScaleUpRequested,
        /// A smaller size is wanted; the stage restarts with it at once.
        ScaleDownRequested,
        /// No other size is wanted.
        ScaleSettled,
        /// Some pods found no node for elastic.capacityTimeoutSeconds, and the stage goes on without them; the message has
        /// the scheduler's words.
        InsufficientCapacity,
        /// The stage trains on the size that is wanted.
        FullSize,
        /// All stages are complete.
        AllStagesCompleted,
        /// More restarts than failurePolicy.maxRestarts.
        MaxRestartsExceeded,
        /// Longer than runPolicy.activeDeadlineSeconds.
        DeadlineExceeded,
        /// Not ready within runPolicy.startupDeadlineSeconds.
        StartupDeadlineExceeded,
        /// A growth step failed.
        TransformFailed,
        /// A failure rule says FailJob.
        FailurePolicyRule,
        /// A pod found the job or its files at fault; the message is its own.
        InvalidInput,
    }
}

use Reason as R;

impl ConditionType {
    /// Reasons with which the condition may be True.
    pub const fn true_reasons(self) -> &'static [Reason] {
        match self {
            Self::Accepted => &[R::Valid],
            Self::Suspended => &[R::Suspended],
            Self::PodsScheduled => &[R::AllPodsScheduled],
            Self::Running => &[R::TrainersReady, R::TransformRunning],
            Self::Progressing => &[R::StepsAdvancing],
            Self::CheckpointAvailable => &[R::Committed],
            Self::Scaling => &[R::ScaleUpRequested, R::ScaleDownRequested],
            Self::Degraded => &[R::InsufficientCapacity],
            Self::Complete => &[R::AllStagesCompleted],
            Self::Failed => &[
                R::MaxRestartsExceeded,
                R::DeadlineExceeded,
                R::StartupDeadlineExceeded,
                R::TransformFailed,
                R::FailurePolicyRule,
                R::InvalidInput,
            ],
        }
    }

    const fn other_status(self) -> &'static str {
        match self {
            Self::Progressing => "False, Unknown",
            _ => "False",
        }
    }

    /// Reasons with which the condition may be False or Unknown.
    pub const fn other_reasons(self) -> &'static [Reason] {
        match self {
            Self::Accepted => &[R::InvalidSpec, R::InvalidTemplate],
            Self::Suspended => &[R::Resumed],
            Self::PodsScheduled => &[
                R::WaitingForQuota,
                R::QuotaEvicted,
                R::Unschedulable,
                R::WaitingForNodes,
                R::WaitingForPodsTermination,
            ],
            Self::Running => &[
                R::WaitingForJob,
                R::StageTransition,
                R::PodsStarting,
                R::ImagePullFailed,
                R::Restarting,
                R::Suspended,
                R::Finished,
            ],
            Self::Progressing => &[R::Stalled, R::NotReported],
            Self::CheckpointAvailable => &[R::NoCheckpointYet],
            Self::Scaling => &[R::ScaleSettled, R::Suspended, R::StageTransition, R::Finished],
            Self::Degraded => &[R::FullSize, R::Suspended, R::StageTransition, R::Finished],
            Self::Complete | Self::Failed => &[],
        }
    }
}

const INTRODUCTION: &str = "\
<!-- Generated from crds/src/conditions.rs by `cargo run -p growth-crds --bin crdgen`; do not edit. -->

# Conditions and reasons

What `kubectl describe gtj` shows and scripts wait on (`kubectl wait gtj/NAME --for=condition=Complete`). A condition that
was set once stays; its transition time changes with its status only. The message beside a reason is for people and may
change.
";

/// `docs/conditions.md`.
pub fn conditions_page() -> String {
    let rows = ConditionType::ALL.iter().flat_map(|condition| {
        let reasons = |list: &'static [Reason], status: &'static str| {
            list.iter().map(move |reason| format!("| `{reason}` | {status} | {} |\n", reason.meaning()))
        };
        let title =
            format!("\n## {condition}\n\n{}\n\n| reason | status | |\n|---|---|---|\n", condition.meaning());
        std::iter::once(title)
            .chain(reasons(condition.true_reasons(), "True"))
            .chain(reasons(condition.other_reasons(), condition.other_status()))
    });
    INTRODUCTION.to_owned() + &rows.collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_belongs_to_a_condition() {
        for reason in Reason::ALL {
            let used = ConditionType::ALL.iter().any(|condition| {
                condition.true_reasons().contains(reason) || condition.other_reasons().contains(reason)
            });
            assert!(used, "{reason} is used by no condition");
        }
    }

    #[test]
    fn there_are_not_too_many() {
        assert!(ConditionType::ALL.len() <= MAX_CONDITIONS);
    }

    #[test]
    fn a_meaning_is_the_text_beside_the_definition() {
        assert_eq!(Reason::Valid.meaning(), "Accepted: the spec is valid.");
        assert!(Reason::ALL.iter().all(|reason| reason.meaning().ends_with('.')));
    }
}
