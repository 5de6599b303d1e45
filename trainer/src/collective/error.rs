//! What can go wrong between ranks.

/// Result of what ranks do together.
pub type Result<T> = std::result::Result<T, CollectiveError>;

/// What can go wrong between ranks. It can be handed to every thread that waits for another rank.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq)]
pub enum CollectiveError {
    /// Another rank is gone, and with it this attempt.
    #[error(
        "rank {rank} is lost: {reason}; training goes on from the last checkpoint when all ranks start again"
    )]
    PeerLost {
        /// The other rank.
        rank: usize,
        /// How it was noticed, or what it said.
        reason: String,
    },
    /// Another rank does not do what this one does.
    #[error(
        "rank {rank} does not do what this rank does: {problem}; run the same version of the trainer everywhere"
    )]
    Protocol {
        /// The other rank.
        rank: usize,
        /// What was found.
        problem: String,
    },
    /// The ranks did not find each other.
    #[error("the ranks did not meet: {problem}")]
    Rendezvous {
        /// What is missing, and what to do.
        problem: String,
    },
}

impl CollectiveError {
    /// Whether the fault lies with another rank, whose own words count.
    pub fn is_peer_lost(&self) -> bool {
        matches!(self, Self::PeerLost { .. })
    }
}
