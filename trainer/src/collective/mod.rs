//! What the ranks of a stage do together. A rank is one process; it holds all weights, works on its share of the
//! micro-batches and keeps its part of the optimizer's state (ZeRO-1: Rajbhandari et al., "ZeRO", SC 2020).
//!
//! The training loop knows the trait [`Collective`] alone: [`Alone`] does nothing, [`Mesh`] works over TCP, and one over
//! NCCL would queue the same operations on a stream of the device.

mod error;
mod frame;
mod handshake;
mod link;
mod mesh;
mod queue;
mod rendezvous;

pub use error::{CollectiveError, Result};
pub use frame::{Frame, FrameError, Header, Kind, Payload};
pub use handshake::{Identity, Secret};
pub use link::{GRACE, Loss};
pub use mesh::{Mesh, Notes};
pub use rendezvous::{Group, meet, pauses};

use std::ops::Range;
use std::time::Duration;

/// What ranks do together. Every rank calls the same operations in the same order; sums do not depend on when numbers
/// arrive.
///
/// An operation in two halves lets the computation go on between them: `start` takes what it sends, `finish` waits for
/// what it receives. Several may be under way; they finish in the order in which they were started.
pub trait Collective: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Begins to sum `values` over the ranks; rank r will hold the sum of `slices[r]`.
    ///
    /// # Errors
    /// When a rank is lost.
    fn start_reduce_scatter(&mut self, values: &[f32], slices: &[Range<usize>]) -> Result<()>;

    /// Puts the sum over the ranks into this rank's slice of `values`: a balanced binary tree over the rank, split at the
    /// largest power of two.
    ///
    /// # Errors
    /// When a rank is lost.
    fn finish_reduce_scatter(&mut self, values: &mut [f32], slices: &[Range<usize>]) -> Result<()>;

    /// Begins to give this rank's slice of `values` to all others.
    ///
    /// # Errors
    /// When a rank is lost.
    fn start_all_gather(&mut self, values: &[f32], slices: &[Range<usize>]) -> Result<()>;

    /// Puts the slices of the others into `values`.
    ///
    /// # Errors
    /// When a rank is lost.
    fn finish_all_gather(&mut self, values: &mut [f32], slices: &[Range<usize>]) -> Result<()>;

    /// Sends numbers to one rank, which calls [`Collective::receive`] for as many.
    ///
    /// # Errors
    /// When a rank is lost.
    fn send(&mut self, to: usize, numbers: &[f32]) -> Result<()>;

    /// Receives numbers that one rank sends.
    ///
    /// # Errors
    /// When a rank is lost.
    fn receive(&mut self, from: usize, numbers: &mut [f32]) -> Result<()>;

    /// Gives bytes to all and gets everybody's, in the order of the ranks.
    ///
    /// # Errors
    /// When a rank is lost.
    fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Gives rank 0's bytes to all; those of the others are ignored.
    ///
    /// # Errors
    /// When a rank is lost.
    fn broadcast(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let mine = if self.rank() == 0 { bytes } else { &[] };
        Ok(self.exchange(mine)?.swap_remove(0))
    }

    /// Waits until every rank is here.
    ///
    /// # Errors
    /// When a rank is lost.
    fn barrier(&mut self) -> Result<()> {
        self.exchange(&[]).map(drop)
    }

    /// For threads beside the training: `None` where there is nobody to write to.
    fn notes(&self) -> Option<Notes>;

    /// Time that this rank has waited for others so far.
    fn waited(&self) -> Duration;

    /// Takes leave of the others; `failure` is why this rank cannot go on, if so.
    fn leave(&mut self, failure: Option<&str>);
}

/// One rank that trains alone: there is nothing to send, and its own sums are the sums.
#[derive(Debug, Default, Clone, Copy)]
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn world_size(&self) -> usize {
        1
    }

    fn start_reduce_scatter(&mut self, _: &[f32], _: &[Range<usize>]) -> Result<()> {
        Ok(())
    }

    fn finish_reduce_scatter(&mut self, _: &mut [f32], _: &[Range<usize>]) -> Result<()> {
        Ok(())
    }

    fn start_all_gather(&mut self, _: &[f32], _: &[Range<usize>]) -> Result<()> {
        Ok(())
    }

    fn finish_all_gather(&mut self, _: &mut [f32], _: &[Range<usize>]) -> Result<()> {
        Ok(())
    }

    fn send(&mut self, to: usize, _: &[f32]) -> Result<()> {
        Err(nobody(to))
    }

    fn receive(&mut self, from: usize, _: &mut [f32]) -> Result<()> {
        Err(nobody(from))
    }

    fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![mine.to_vec()])
    }

    fn notes(&self) -> Option<Notes> {
        None
    }

    fn waited(&self) -> Duration {
        Duration::ZERO
    }

    fn leave(&mut self, _: Option<&str>) {}
}

fn nobody(rank: usize) -> CollectiveError {
    CollectiveError::Protocol { rank, problem: "this rank trains alone".to_owned() }
}

#[cfg(test)]
pub(crate) mod testing;

#[cfg(test)]
mod tests;
