//! The connection to one other rank: a thread that writes, a thread that reads, queues between them and the computation.

use super::error::CollectiveError;
use super::frame::{Frame, Kind, Payload};
use super::queue::{Closed, Queue};
use std::io::{self, BufReader, BufWriter, ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A rank that has nothing to say says so this often.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// A rank that is silent for so long, or reads nothing, is lost. With [`GRACE`] this keeps below ten seconds.
const SILENCE: Duration = Duration::from_secs(7);

/// Time for the computation to notice a loss by itself before the process is ended from outside.
pub const GRACE: Duration = Duration::from_secs(2);

/// Time for the others to take leave.
const FAREWELL: Duration = Duration::from_secs(3);

/// Bytes of notes that may wait: lists of objects, far below this.
const NOTES_BYTES: usize = 16 << 20;

/// Bytes of the reason why a rank ends.
const LONGEST_FAREWELL: usize = 1000;

/// Bytes that small frames are collected in.
const BUFFER_BYTES: usize = 1 << 16;

/// The first loss of a rank, told to everyone in this process who waits for any.
#[derive(Default)]
pub struct Loss {
    lost: Mutex<Option<CollectiveError>>,
    changed: Condvar,
    queues: Mutex<Vec<Arc<Queue>>>,
}

impl Loss {
    fn watch(&self, queue: &Arc<Queue>) {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner).push(queue.clone());
    }

    /// Reports a loss: the first one counts, and ends all queues.
    pub fn report(&self, error: CollectiveError) {
        let first = self.lost.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error).clone();
        self.changed.notify_all();
        for queue in self.queues.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            queue.close(Closed::Failed(first.clone()));
        }
    }

    /// Waits until a rank is lost.
    pub fn wait(&self) -> CollectiveError {
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(error) = &*lost {
                return error.clone();
            }
            lost = self.changed.wait(lost).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The connection to one other rank.
pub struct Link {
    /// What is to be sent.
    pub outbox: Arc<Queue>,
    /// Numbers and bytes that came.
    pub inbox: Arc<Queue>,
    /// Notes that came.
    pub notes: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
    leaving: Arc<AtomicBool>,
}

impl Link {
    /// Starts the threads. `capacity_bytes` may wait to be computed with, and to be sent.
    pub fn start(
        rank: usize,
        socket: TcpStream,
        capacity_bytes: usize,
        loss: &Arc<Loss>,
    ) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.set_write_timeout(Some(SILENCE))?;
        let [outbox, inbox] = [(); 2].map(|()| Arc::new(Queue::new(capacity_bytes)));
        let notes = Arc::new(Queue::new(NOTES_BYTES));
        [&outbox, &inbox, &notes].into_iter().for_each(|queue| loss.watch(queue));
        let leaving = Arc::new(AtomicBool::new(false));
        let writer = Writer { rank, socket: socket.try_clone()?, outbox: outbox.clone(), loss: loss.clone() };
        let reader = Reader {
            rank,
            socket,
            inbox: inbox.clone(),
            notes: notes.clone(),
            outbox: outbox.clone(),
            loss: loss.clone(),
            leaving: leaving.clone(),
        };
        let spawn = |name: String| std::thread::Builder::new().name(name);
        let threads = vec![
            spawn(format!("to-rank-{rank}")).spawn(move || writer.run())?,
            spawn(format!("from-rank-{rank}")).spawn(move || reader.run())?,
        ];
        Ok(Self { outbox, inbox, notes, threads, leaving })
    }

    /// Says how this rank's work ended, after all that is still to be sent.
    pub fn say_farewell(&self, failure: Option<&str>) {
        let frame = match failure {
            None => Frame::bytes(Kind::Done, 0, false, &[]),
            Some(text) => last_words(text),
        };
        self.leaving.store(true, Ordering::Relaxed);
        // A queue that is closed has nobody to say it to.
        let _ = self.outbox.push(frame);
        self.outbox.close(Closed::Done);
    }

    /// Waits until the other rank has heard it, or a while.
    pub fn close(&mut self) {
        for thread in self.threads.drain(..) {
            // A panic there has ended the connection, which is all that this waits for.
            let _ = thread.join();
        }
    }
}

fn last_words(text: &str) -> Frame {
    Frame::bytes(Kind::Failed, 0, false, &text.as_bytes()[..text.len().min(LONGEST_FAREWELL)])
}

struct Writer {
    rank: usize,
    socket: TcpStream,
    outbox: Arc<Queue>,
    loss: Arc<Loss>,
}

impl Writer {
    fn run(self) {
        if let Err(error) = self.write_all() {
            // When the other rank has taken leave, the reader knows, and this is the consequence.
            let reason = match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => format!("it takes nothing for {SILENCE:?}"),
                _ => return,
            };
            self.loss.report(CollectiveError::PeerLost { rank: self.rank, reason });
        }
    }

    fn write_all(&self) -> io::Result<()> {
        let mut writer = BufWriter::with_capacity(BUFFER_BYTES, &self.socket);
        loop {
            match self.outbox.pop_within(HEARTBEAT) {
                None => Frame::bytes(Kind::Heartbeat, 0, false, &[]).write(&mut writer)?,
                Some(Ok(frame)) => frame.write(&mut writer)?,
                Some(Err(Closed::Done)) => break,
                Some(Err(Closed::Failed(error))) => {
                    // The others may not have seen yet who was lost.
                    last_words(&error.to_string()).write(&mut writer)?;
                    break;
                }
            }
            writer.flush()?;
        }
        writer.flush()?;
        self.socket.shutdown(Shutdown::Write)
    }
}

struct Reader {
    rank: usize,
    socket: TcpStream,
    inbox: Arc<Queue>,
    notes: Arc<Queue>,
    outbox: Arc<Queue>,
    loss: Arc<Loss>,
    leaving: Arc<AtomicBool>,
}

impl Reader {
    fn run(self) {
        match self.read_all() {
            Ok(()) => {
                [&self.inbox, &self.notes, &self.outbox]
                    .into_iter()
                    .for_each(|queue| queue.close(Closed::Done));
            }
            Err(_) if self.leaving.load(Ordering::Relaxed) => {}
            Err(error) => self.loss.report(error),
        }
    }

    /// Reads until the other rank takes leave, or this one has and waited for long enough.
    fn read_all(&self) -> Result<(), CollectiveError> {
        let mut reader = BufReader::with_capacity(BUFFER_BYTES, &self.socket);
        let mut left_at = None;
        loop {
            let frame = Frame::read(&mut reader).map_err(|error| self.describe(&error))?;
            if self.leaving.load(Ordering::Relaxed)
                && left_at.get_or_insert_with(Instant::now).elapsed() > FAREWELL
            {
                return Ok(());
            }
            let queue = match frame.kind {
                Kind::Heartbeat => continue,
                Kind::Numbers | Kind::Bytes => &self.inbox,
                Kind::Note => &self.notes,
                Kind::Done => return Ok(()),
                Kind::Failed => return Err(self.lost(farewell(&frame.payload))),
            };
            // A queue that is closed throws away what nobody waits for.
            let _ = queue.push(frame);
        }
    }

    fn describe(&self, error: &io::Error) -> CollectiveError {
        match error.kind() {
            ErrorKind::InvalidData => {
                CollectiveError::Protocol { rank: self.rank, problem: error.to_string() }
            }
            ErrorKind::WouldBlock | ErrorKind::TimedOut => self.lost(format!("it is silent for {SILENCE:?}")),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted => {
                self.lost("its connection has ended".to_owned())
            }
            _ => self.lost(format!("its connection has failed: {error}")),
        }
    }

    fn lost(&self, reason: String) -> CollectiveError {
        CollectiveError::PeerLost { rank: self.rank, reason }
    }
}

fn farewell(payload: &Payload) -> String {
    match payload {
        Payload::Bytes(bytes) => format!("it has failed: {}", String::from_utf8_lossy(bytes)),
        Payload::Numbers(_) => "it has failed".to_owned(),
    }
}
