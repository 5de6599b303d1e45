//! [`Collective`] over TCP, every rank connected with every other.

use super::Collective;
use super::error::{CollectiveError, Result};
use super::frame::{Frame, Kind, MAX_NUMBERS, MAX_PAYLOAD_BYTES, Payload};
use super::link::{Link, Loss};
use super::queue::{Closed, Queue};
use std::io;
use std::net::TcpStream;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest message of bytes: what the ranks tell each other in a step grows with the model, 8 bytes for 4 KiB of it.
const LONGEST_MESSAGE: usize = 1 << 30;

/// Room in a queue beside the numbers of a step.
const SLACK_BYTES: usize = 4 << 20;

/// A full mesh of connections.
pub struct Mesh {
    rank: usize,
    /// By rank; none to itself.
    links: Vec<Option<Link>>,
    loss: Arc<Loss>,
    /// Number of the next operation that is started, and of the next one that is finished.
    started: u32,
    finished: u32,
    waited: Duration,
    has_left: bool,
}

impl Mesh {
    /// A mesh over connections to all other ranks; `sockets` is by rank, and has none for this one. `part_bytes` is what
    /// one rank sends another in a step at most.
    ///
    /// # Errors
    /// When the connections cannot be set up.
    pub fn new(rank: usize, sockets: Vec<Option<TcpStream>>, part_bytes: usize) -> io::Result<Self> {
        let loss = Arc::new(Loss::default());
        let capacity = part_bytes.saturating_add(SLACK_BYTES);
        let start = |(peer, socket): (usize, Option<TcpStream>)| {
            socket.map(|socket| Link::start(peer, socket, capacity, &loss)).transpose()
        };
        let links = sockets.into_iter().enumerate().map(start).collect::<io::Result<_>>()?;
        let waited = Duration::ZERO;
        Ok(Self { rank, links, loss, started: 0, finished: 0, waited, has_left: false })
    }

    /// Where the loss of a rank is told.
    pub fn loss(&self) -> Arc<Loss> {
        self.loss.clone()
    }

    /// The other ranks, beginning with the next one, so that not all send to the same one first.
    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world) = (self.rank, self.links.len());
        (1..world).map(move |distance| (rank + distance) % world)
    }

    fn link(&self, peer: usize) -> Result<&Link> {
        let missing =
            || CollectiveError::Protocol { rank: peer, problem: "there is no such rank".to_owned() };
        self.links.get(peer).and_then(Option::as_ref).ok_or_else(missing)
    }

    fn push_numbers(&self, peer: usize, operation: u32, numbers: &[f32]) -> Result<()> {
        let link = self.link(peer)?;
        for piece in numbers.chunks(MAX_NUMBERS) {
            link.outbox.push(Frame::numbers(operation, piece)).map_err(|closed| gone(peer, closed))?;
        }
        Ok(())
    }

    /// The next frame of numbers from `peer`, which must be that of `operation` and have `len` numbers.
    fn pop_numbers(&mut self, peer: usize, operation: u32, len: usize) -> Result<Vec<f32>> {
        match self.pop(peer, Kind::Numbers, operation)?.payload {
            Payload::Numbers(numbers) if numbers.len() == len => Ok(numbers),
            payload => {
                let found = match payload {
                    Payload::Numbers(numbers) => numbers.len(),
                    Payload::Bytes(_) => 0,
                };
                let problem = format!("it sent {found} numbers instead of {len}");
                Err(self.refuse(CollectiveError::Protocol { rank: peer, problem }))
            }
        }
    }

    fn pop(&mut self, peer: usize, kind: Kind, operation: u32) -> Result<Frame> {
        let begin = Instant::now();
        let frame = self.link(peer)?.inbox.pop().map_err(|closed| gone(peer, closed));
        self.waited += begin.elapsed();
        let frame = frame?;
        if (frame.kind, frame.operation) == (kind, operation) {
            return Ok(frame);
        }
        let problem = format!(
            "it is at operation {} ({:?}), this rank at {operation} ({kind:?})",
            frame.operation, frame.kind
        );
        Err(self.refuse(CollectiveError::Protocol { rank: peer, problem }))
    }

    /// Ends all work with the others: one of them cannot be worked with.
    fn refuse(&self, error: CollectiveError) -> CollectiveError {
        self.loss.report(error.clone());
        error
    }

    fn begin(&mut self) -> u32 {
        self.started = self.started.wrapping_add(1);
        self.started
    }

    fn end(&mut self) -> u32 {
        self.finished = self.finished.wrapping_add(1);
        self.finished
    }
}

/// Why there is nothing to get from, or to give to, a rank.
fn gone(rank: usize, closed: Closed) -> CollectiveError {
    match closed {
        Closed::Failed(error) => error,
        Closed::Done => CollectiveError::PeerLost { rank, reason: "it has taken leave".to_owned() },
    }
}

impl Collective for Mesh {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.links.len()
    }

    fn start_reduce_scatter(&mut self, values: &[f32], slices: &[Range<usize>]) -> Result<()> {
        let operation = self.begin();
        self.peers().try_for_each(|peer| self.push_numbers(peer, operation, &values[slices[peer].clone()]))
    }

    fn finish_reduce_scatter(&mut self, values: &mut [f32], slices: &[Range<usize>]) -> Result<()> {
        let operation = self.end();
        for own in values[slices[self.rank].clone()].chunks_mut(MAX_NUMBERS) {
            let mut pieces = Vec::with_capacity(self.links.len());
            for peer in 0..self.links.len() {
                pieces.push(match peer == self.rank {
                    true => own.to_vec(),
                    false => self.pop_numbers(peer, operation, own.len())?,
                });
            }
            own.copy_from_slice(tree_sum(&mut pieces));
        }
        Ok(())
    }

    fn start_all_gather(&mut self, values: &[f32], slices: &[Range<usize>]) -> Result<()> {
        let operation = self.begin();
        let own = &values[slices[self.rank].clone()];
        self.peers().try_for_each(|peer| self.push_numbers(peer, operation, own))
    }

    fn finish_all_gather(&mut self, values: &mut [f32], slices: &[Range<usize>]) -> Result<()> {
        let operation = self.end();
        for peer in self.peers() {
            for piece in values[slices[peer].clone()].chunks_mut(MAX_NUMBERS) {
                piece.copy_from_slice(&self.pop_numbers(peer, operation, piece.len())?);
            }
        }
        Ok(())
    }

    fn send(&mut self, to: usize, numbers: &[f32]) -> Result<()> {
        // Not every rank takes part, so these have no number of their own: what comes first was sent first.
        self.push_numbers(to, 0, numbers)
    }

    fn receive(&mut self, from: usize, numbers: &mut [f32]) -> Result<()> {
        for piece in numbers.chunks_mut(MAX_NUMBERS) {
            piece.copy_from_slice(&self.pop_numbers(from, 0, piece.len())?);
        }
        Ok(())
    }

    fn exchange(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let started = self.begin();
        for peer in self.peers() {
            push_bytes(&self.link(peer)?.outbox, Kind::Bytes, started, mine)
                .map_err(|closed| gone(peer, closed))?;
        }
        let operation = self.end();
        let mut all = Vec::with_capacity(self.links.len());
        for peer in 0..self.links.len() {
            if peer == self.rank {
                all.push(mine.to_vec());
                continue;
            }
            let message = collect(peer, || self.pop(peer, Kind::Bytes, operation));
            all.push(message.map_err(|error| self.refuse(error))?);
        }
        Ok(all)
    }

    fn notes(&self) -> Option<Notes> {
        let queues = |link: &Link| (link.outbox.clone(), link.notes.clone());
        let links = self.links.iter().map(|link| link.as_ref().map(queues)).collect();
        Some(Notes { rank: self.rank, links })
    }

    fn waited(&self) -> Duration {
        self.waited
    }

    fn leave(&mut self, failure: Option<&str>) {
        self.has_left = true;
        let links = || self.links.iter().flatten();
        links().for_each(|link| link.say_farewell(failure));
        self.links.iter_mut().flatten().for_each(Link::close);
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if !self.has_left {
            self.leave(Some("it has ended without a word"));
        }
    }
}

/// Messages between the threads of different ranks that write checkpoints.
#[derive(Clone)]
pub struct Notes {
    rank: usize,
    /// Outbox and notes of the other ranks.
    links: Vec<Option<(Arc<Queue>, Arc<Queue>)>>,
}

impl Notes {
    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.links.len()
    }

    fn link(&self, peer: usize) -> Result<&(Arc<Queue>, Arc<Queue>)> {
        self.links.get(peer).and_then(Option::as_ref).ok_or_else(|| super::nobody(peer))
    }

    /// Sends a message to one rank.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn send(&self, to: usize, message: &[u8]) -> Result<()> {
        push_bytes(&self.link(to)?.0, Kind::Note, 0, message).map_err(|closed| gone(to, closed))
    }

    /// Waits for the next message of one rank.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn receive(&self, from: usize) -> Result<Vec<u8>> {
        let (_, notes) = self.link(from)?;
        collect(from, || notes.pop().map_err(|closed| gone(from, closed)))
    }
}

fn push_bytes(outbox: &Queue, kind: Kind, operation: u32, bytes: &[u8]) -> std::result::Result<(), Closed> {
    let mut rest = bytes;
    loop {
        let (piece, later) = rest.split_at(rest.len().min(MAX_PAYLOAD_BYTES));
        outbox.push(Frame::bytes(kind, operation, !later.is_empty(), piece))?;
        if later.is_empty() {
            return Ok(());
        }
        rest = later;
    }
}

/// A whole message from the frames of `rank` that `next` gives.
fn collect(rank: usize, mut next: impl FnMut() -> Result<Frame>) -> Result<Vec<u8>> {
    let mut message = Vec::new();
    loop {
        let frame = next()?;
        message.extend_from_slice(frame.payload_bytes());
        if message.len() > LONGEST_MESSAGE {
            let problem = format!("its message is longer than {LONGEST_MESSAGE} bytes");
            return Err(CollectiveError::Protocol { rank, problem });
        }
        if !frame.more {
            return Ok(message);
        }
    }
}

/// The sum of equally long pieces, in a balanced binary tree split at the largest power of two: the same tree that
/// [`crate::ops::gradient::GradientTree`] builds over micro-batches, continued over ranks.
fn tree_sum(pieces: &mut [Vec<f32>]) -> &[f32] {
    if pieces.len() > 1 {
        let half = pieces.len().next_power_of_two() / 2;
        let (left, right) = pieces.split_at_mut(half);
        tree_sum(left);
        let right = tree_sum(right);
        left[0].iter_mut().zip(right).for_each(|(sum, value)| *sum += value);
    }
    &pieces[0]
}
