//! Condition types and their reasons: a stable interface that scripts wait on. Conditions are never removed.

use std::fmt;

/// Most conditions a status may hold.
pub const MAX_CONDITIONS: usize = 16;

macro_rules! words {
    ($(#[$attribute:meta])* $name:ident { $($(#[$variant_attribute:meta])* $variant:ident,)* }) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$variant_attribute])* $variant,)*
        }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The word in the object.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => stringify!($variant),)* }
            }

            /// The member with this word.
            pub fn from_word(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|member| member.as_str() == word)
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
        /// The attempt ends so that the next one has another size.
        Scaling,
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
        /// Not accepted: managedBy names another controller.
        ManagedElsewhere,
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
        /// The last one could not be written.
        CommitFailed,
        /// Its content is not what its manifest says.
        DigestMismatch,
        /// A larger size was asked for.
        ScaleUpRequested,
        /// A smaller size was asked for.
        ScaleDownRequested,
        /// The size is the wanted one.
        Stable,
        /// A larger size waits for scaleUpDelaySeconds.
        HeldByDelay,
        /// The queue does not grant a larger size.
        QuotaDenied,
        /// All stages are complete.
        AllStagesCompleted,
        /// More restarts than failurePolicy.maxRestarts.
        MaxRestartsExceeded,
        /// Longer than runPolicy.activeDeadlineSeconds.
        DeadlineExceeded,
        /// Not ready within runPolicy.startupDeadlineSeconds.
        StartupDeadlineExceeded,
        /// No step within runPolicy.progressDeadlineSeconds.
        ProgressDeadlineExceeded,
        /// A growth step failed.
        TransformFailed,
        /// A failure rule says FailJob.
        FailurePolicyRule,
        /// A pod found the job or its files at fault; the message is its own.
        InvalidInput,
        /// No intact checkpoint is left.
        CheckpointCorrupt,
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
            Self::Complete => &[R::AllStagesCompleted],
            Self::Failed => &[
                R::MaxRestartsExceeded,
                R::DeadlineExceeded,
                R::StartupDeadlineExceeded,
                R::ProgressDeadlineExceeded,
                R::TransformFailed,
                R::FailurePolicyRule,
                R::InvalidInput,
                R::CheckpointCorrupt,
            ],
        }
    }

    /// Reasons with which the condition may be False or Unknown.
    pub const fn other_reasons(self) -> &'static [Reason] {
        match self {
            Self::Accepted => &[R::InvalidSpec, R::InvalidTemplate, R::ManagedElsewhere],
            Self::Suspended => &[R::Resumed],
            Self::PodsScheduled => &[
                R::WaitingForQuota,
                R::QuotaEvicted,
                R::Unschedulable,
                R::WaitingForNodes,
                R::WaitingForPodsTermination,
            ],
            Self::Running => &[
                R::StageTransition,
                R::PodsStarting,
                R::ImagePullFailed,
                R::Restarting,
                R::Suspended,
                R::Finished,
            ],
            Self::Progressing => &[R::Stalled, R::NotReported],
            Self::CheckpointAvailable => &[R::NoCheckpointYet, R::CommitFailed, R::DigestMismatch],
            Self::Scaling => &[R::Stable, R::HeldByDelay, R::QuotaDenied],
            Self::Complete | Self::Failed => &[],
        }
    }
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
    fn words_read_back() {
        for condition in ConditionType::ALL {
            assert_eq!(ConditionType::from_word(&condition.to_string()), Some(*condition));
        }
        assert_eq!(Reason::from_word("Nonsense"), None);
        assert!(ConditionType::ALL.len() <= MAX_CONDITIONS);
    }
}
