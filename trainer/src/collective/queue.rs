//! A queue of frames between a thread that talks to a socket and one that computes, bounded in bytes.

use super::error::CollectiveError;
use super::frame::Frame;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Why nothing comes any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Closed {
    /// All is said.
    Done,
    /// Something is wrong.
    Failed(CollectiveError),
}

/// Frames in the order in which they came.
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
    capacity_bytes: usize,
}

#[derive(Default)]
struct State {
    frames: VecDeque<Frame>,
    bytes: usize,
    closed: Option<Closed>,
}

impl Queue {
    /// A queue that holds so many bytes of payload, or one frame.
    pub fn new(capacity_bytes: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), capacity_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a frame; waits for room.
    pub fn push(&self, frame: Frame) -> Result<(), Closed> {
        let bytes = frame.payload_bytes().len();
        let is_full = |state: &mut State| {
            state.closed.is_none() && !state.frames.is_empty() && state.bytes + bytes > self.capacity_bytes
        };
        let mut state = self.changed.wait_while(self.lock(), is_full).unwrap_or_else(PoisonError::into_inner);
        if let Some(closed) = &state.closed {
            return Err(closed.clone());
        }
        state.bytes += bytes;
        state.frames.push_back(frame);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// The next frame; waits for it. What came before the end is still delivered, unless something went wrong.
    pub fn pop(&self) -> Result<Frame, Closed> {
        let is_empty = |state: &mut State| state.closed.is_none() && state.frames.is_empty();
        let state = self.changed.wait_while(self.lock(), is_empty).unwrap_or_else(PoisonError::into_inner);
        self.take(state).unwrap_or(Err(Closed::Done))
    }

    /// As [`Queue::pop`], but `None` when nothing comes in time.
    pub fn pop_within(&self, timeout: Duration) -> Option<Result<Frame, Closed>> {
        let is_empty = |state: &mut State| state.closed.is_none() && state.frames.is_empty();
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, is_empty)
            .unwrap_or_else(PoisonError::into_inner);
        self.take(state)
    }

    fn take(&self, mut state: MutexGuard<'_, State>) -> Option<Result<Frame, Closed>> {
        if let Some(closed @ Closed::Failed(_)) = &state.closed {
            return Some(Err(closed.clone()));
        }
        let Some(frame) = state.frames.pop_front() else { return state.closed.clone().map(Err) };
        state.bytes -= frame.payload_bytes().len();
        drop(state);
        self.changed.notify_all();
        Some(Ok(frame))
    }

    /// Ends the queue, for both sides. The first reason stands.
    pub fn close(&self, reason: Closed) {
        self.lock().closed.get_or_insert(reason);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::frame::Kind;
    use super::*;
    use std::sync::Arc;

    fn frame(operation: u32) -> Frame {
        Frame::bytes(Kind::Bytes, operation, false, &[0; 10])
    }

    #[test]
    fn a_full_queue_waits_and_an_ended_one_is_emptied() {
        let queue = Arc::new(Queue::new(20));
        let sender = std::thread::spawn({
            let queue = queue.clone();
            move || {
                (0..100).for_each(|operation| queue.push(frame(operation)).unwrap());
                queue.close(Closed::Done);
            }
        });
        for operation in 0..100 {
            assert!(queue.lock().frames.len() <= 2);
            assert_eq!(queue.pop().unwrap().operation, operation);
        }
        assert_eq!(queue.pop(), Err(Closed::Done));
        sender.join().unwrap();
    }

    #[test]
    fn a_failure_wakes_both_sides_at_once() {
        let error = CollectiveError::PeerLost { rank: 1, reason: "gone".to_owned() };
        let queue = Arc::new(Queue::new(1));
        queue.push(frame(0)).unwrap();
        let sender = std::thread::spawn({
            let queue = queue.clone();
            move || queue.push(frame(1))
        });
        queue.close(Closed::Failed(error.clone()));
        queue.close(Closed::Done);
        assert_eq!(sender.join().unwrap(), Err(Closed::Failed(error.clone())));
        assert_eq!(queue.pop(), Err(Closed::Failed(error)));
    }
}
