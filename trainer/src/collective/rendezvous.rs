//! How the ranks of an attempt find each other. Every rank but the first calls rank 0, whose address all know, and tells
//! where it listens itself; when all have called, rank 0 tells each where the others are, and every rank calls the lower
//! ones. Strangers are refused, and do not disturb.

use super::error::{CollectiveError, Result};
use super::handshake::{Identity, Introduction, Secret, introduce, receive};
use super::mesh::Mesh;
use backon::{BackoffBuilder, ExponentialBuilder};
use std::cell::Cell;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time for the two sides of a connection to make sure of each other.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Longest time between two tries, and time between two looks whether to stop.
const PAUSE: Duration = Duration::from_millis(100);

/// Time between two words on whom is waited for.
const REMINDER: Duration = Duration::from_secs(60);

/// Time to call the other ranks once all are known to be there.
const CALL: Duration = Duration::from_secs(10);

/// Strangers that may be talked to at once.
const MOST_HANDSHAKES: usize = 64;

/// A rank and whom it belongs to.
#[derive(Debug, Clone)]
pub struct Group {
    /// This rank, from 0.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// `host:port` on which rank 0 expects the others.
    pub leader: String,
    /// What all have in common.
    pub identity: Identity,
    /// What nobody else knows.
    pub secret: Secret,
    /// How long to wait for the others.
    pub patience: Duration,
    /// What one rank sends another in a step at most.
    pub part_bytes: usize,
}

/// Waits until all ranks are connected with each other. `listener` is where rank 0 expects the others; without one it
/// listens on the port of `leader`. `warn` hears of strangers; `give_up` says why to wait no longer, if so.
///
/// # Errors
/// When not all ranks come in time, or this one is refused.
pub fn meet(
    group: &Group,
    listener: Option<TcpListener>,
    warn: &dyn Fn(String),
    give_up: &dyn Fn() -> Option<String>,
) -> Result<Mesh> {
    let now = Instant::now();
    let meeting = Meeting { group, deadline: now + group.patience, reminded: Cell::new(now), warn, give_up };
    let sockets = match group.rank {
        0 => meeting.lead(listener)?,
        _ => meeting.join()?,
    };
    Mesh::new(group.rank, sockets, group.part_bytes).map_err(|error| rendezvous(error.to_string()))
}

fn rendezvous(problem: impl Into<String>) -> CollectiveError {
    CollectiveError::Rendezvous { problem: problem.into() }
}

struct Meeting<'a> {
    group: &'a Group,
    deadline: Instant,
    reminded: Cell<Instant>,
    warn: &'a dyn Fn(String),
    give_up: &'a dyn Fn() -> Option<String>,
}

impl Meeting<'_> {
    fn lead(&self, listener: Option<TcpListener>) -> Result<Vec<Option<TcpStream>>> {
        let world = self.group.world_size;
        let listener = match listener {
            Some(listener) => listener,
            None => listen(port_of(&self.group.leader)?)?,
        };
        let callers = Callers::start(self.group, listener, 1..world);
        let found = self.await_callers(&callers)?;
        let roster = roster(&found)?;
        let mut sockets = sockets_of(found);
        for (rank, socket) in sockets.iter_mut().enumerate() {
            let Some(socket) = socket else { continue };
            let sent = write_roster(socket, &roster);
            sent.map_err(|error| CollectiveError::PeerLost { rank, reason: error.to_string() })?;
        }
        Ok(sockets)
    }

    fn join(&self) -> Result<Vec<Option<TcpStream>>> {
        let Group { rank, world_size, leader, .. } = self.group;
        let listener = listen(0)?;
        let port = listener.local_addr().map_err(|error| rendezvous(error.to_string()))?.port();
        let mut to_leader = self.call(0, port, self.deadline, || resolve(leader))?;
        let roster = self.await_roster(&mut to_leader)?;
        let callers = Callers::start(self.group, listener, rank + 1..*world_size);
        let mut sockets = vec![Some(to_leader)];
        for (lower, address) in roster.iter().enumerate().take(*rank).skip(1) {
            let deadline = Instant::now() + CALL;
            let lost = |error: CollectiveError| match error {
                CollectiveError::Rendezvous { problem } => {
                    CollectiveError::PeerLost { rank: lower, reason: problem }
                }
                other => other,
            };
            sockets.push(Some(self.call(lower, port, deadline, || Ok(vec![*address])).map_err(lost)?));
        }
        sockets.extend(sockets_of(self.await_callers(&callers)?).into_iter().skip(*rank));
        Ok(sockets)
    }

    /// Whether there is still reason to wait.
    fn check(&self, waits_for: &str) -> Result<()> {
        if let Some(reason) = (self.give_up)() {
            return Err(rendezvous(format!("{reason} while waiting for {waits_for}")));
        }
        if Instant::now() > self.deadline {
            let waited = self.group.patience.as_secs();
            return Err(rendezvous(format!(
                "waited {waited} s for {waits_for}; see whether all {} pods run and can reach each other",
                self.group.world_size
            )));
        }
        if self.reminded.get().elapsed() >= REMINDER {
            self.reminded.set(Instant::now());
            (self.warn)(format!("still waiting for {waits_for}"));
        }
        Ok(())
    }

    /// The ranks that call, by rank, when all that are expected have.
    fn await_callers(&self, callers: &Callers) -> Result<Vec<Option<Caller>>> {
        let mut found: Vec<Option<Caller>> = (0..self.group.world_size).map(|_| None).collect();
        while let Some(missing) = callers.expected.clone().find(|rank| found[*rank].is_none()) {
            self.check(&format!("rank {missing}"))?;
            match callers.results.recv_timeout(PAUSE) {
                Ok(Ok(caller)) => {
                    let rank = caller.0.rank as usize;
                    found[rank] = Some(caller);
                }
                Ok(Err(problem)) => (self.warn)(problem),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(rendezvous("nobody listens any more")),
            }
        }
        Ok(found)
    }

    /// Connects to a rank and makes sure of it; tries again until `deadline`.
    fn call(
        &self,
        rank: usize,
        port: u16,
        deadline: Instant,
        resolve: impl Fn() -> io::Result<Vec<SocketAddr>>,
    ) -> Result<TcpStream> {
        let me =
            Introduction { rank: self.group.rank as u32, world_size: self.group.world_size as u32, port };
        let mut rests = pauses(PAUSE);
        loop {
            let error = match self.try_call(me, &resolve) {
                Ok(stream) => return Ok(stream),
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                    return Err(rendezvous(format!("rank {rank} has refused rank {}: {error}", me.rank)));
                }
                Err(error) => error,
            };
            if Instant::now() > deadline {
                return Err(rendezvous(format!("rank {rank} does not answer: {error}")));
            }
            self.check(&format!("rank {rank} ({error})"))?;
            std::thread::sleep(rests.next().unwrap_or(PAUSE));
        }
    }

    fn try_call(
        &self,
        me: Introduction,
        resolve: impl Fn() -> io::Result<Vec<SocketAddr>>,
    ) -> io::Result<TcpStream> {
        let mut last = io::Error::new(ErrorKind::NotFound, "its name has no address yet");
        for address in resolve()? {
            let connected = TcpStream::connect_timeout(&address, HANDSHAKE).and_then(|mut stream| {
                limit(&stream)?;
                introduce(&mut stream, &self.group.secret, &self.group.identity, me)?;
                Ok(stream)
            });
            match connected {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Waits for rank 0 to tell where the others are.
    fn await_roster(&self, leader: &mut TcpStream) -> Result<Vec<SocketAddr>> {
        let lost = |error: io::Error| CollectiveError::PeerLost { rank: 0, reason: error.to_string() };
        leader.set_read_timeout(Some(PAUSE)).map_err(lost)?;
        loop {
            match leader.peek(&mut [0]) {
                Ok(0) => return Err(lost(io::Error::new(ErrorKind::UnexpectedEof, "it has ended"))),
                Ok(_) => break,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    self.check("the other ranks")?;
                }
                Err(error) => return Err(lost(error)),
            }
        }
        limit(leader).map_err(lost)?;
        read_roster(leader, self.group.world_size).map_err(lost)
    }
}

/// Pauses between tries to find another rank: short at first, for most ranks start together, and later up to `longest`.
pub fn pauses(longest: Duration) -> impl Iterator<Item = Duration> {
    let first = Duration::from_millis(5);
    ExponentialBuilder::new().with_min_delay(first).with_max_delay(longest).without_max_times().build()
}

/// A stream on which nobody waits for long.
fn limit(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HANDSHAKE))?;
    stream.set_write_timeout(Some(HANDSHAKE))
}

fn listen(port: u16) -> Result<TcpListener> {
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    TcpListener::bind(address).map_err(|error| {
        rendezvous(format!(
            "port {port} cannot be listened on: {error}; is there another rank 0 on this machine?"
        ))
    })
}

fn port_of(leader: &str) -> Result<u16> {
    let port = leader.rsplit_once(':').and_then(|(_, port)| port.parse().ok());
    port.ok_or_else(|| rendezvous(format!("{leader} has no port; write host:port")))
}

fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    Ok(address.to_socket_addrs()?.collect())
}

/// Addresses of the ranks as rank 0 sees them; its own is not used.
fn roster(callers: &[Option<Caller>]) -> Result<Vec<SocketAddr>> {
    let address = |caller: &Option<Caller>| match caller {
        Some((introduction, socket)) => {
            socket.peer_addr().map(|peer| SocketAddr::new(peer.ip(), introduction.port))
        }
        None => Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0)),
    };
    let roster = callers.iter().map(address).collect::<io::Result<_>>();
    roster.map_err(|error| rendezvous(error.to_string()))
}

fn sockets_of(callers: Vec<Option<Caller>>) -> Vec<Option<TcpStream>> {
    callers.into_iter().map(|caller| caller.map(|(_, socket)| socket)).collect()
}

fn write_roster(stream: &mut impl Write, roster: &[SocketAddr]) -> io::Result<()> {
    for address in roster {
        let text = address.to_string();
        // An address has some fifty characters at most.
        stream.write_all(&[&[text.len() as u8], text.as_bytes()].concat())?;
    }
    Ok(())
}

fn read_roster(stream: &mut impl Read, world_size: usize) -> io::Result<Vec<SocketAddr>> {
    let address = |_| {
        let mut length = [0];
        stream.read_exact(&mut length)?;
        let mut text = vec![0; usize::from(length[0])];
        stream.read_exact(&mut text)?;
        let text = String::from_utf8_lossy(&text);
        text.parse().map_err(|_| io::Error::new(ErrorKind::InvalidData, format!("{text} is no address")))
    };
    (0..world_size).map(address).collect()
}

/// A rank that has called.
type Caller = (Introduction, TcpStream);

/// Who was refused instead, and why.
type Call = std::result::Result<Caller, String>;

/// Those who call: a thread that accepts, and one for each handshake, so that a silent stranger holds up nobody.
struct Callers {
    expected: Range<usize>,
    results: Receiver<Call>,
    _desk: Arc<Desk>,
}

/// What the threads of [`Callers`] share.
struct Desk {
    secret: Secret,
    identity: Identity,
    world_size: usize,
    expected: Range<usize>,
    joined: Mutex<Vec<bool>>,
    busy: AtomicUsize,
}

impl Callers {
    fn start(group: &Group, listener: TcpListener, expected: Range<usize>) -> Self {
        let (sender, results) = channel();
        let desk = Arc::new(Desk {
            secret: group.secret.clone(),
            identity: group.identity.clone(),
            world_size: group.world_size,
            expected: expected.clone(),
            joined: Mutex::new(vec![false; group.world_size]),
            busy: AtomicUsize::new(0),
        });
        let weak = Arc::downgrade(&desk);
        // It ends with the first caller after the meeting, or with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // The meeting holds the desk; after it nobody is expected.
                let Some(desk) = weak.upgrade() else { break };
                if desk.busy.load(Ordering::Relaxed) >= MOST_HANDSHAKES {
                    continue;
                }
                desk.busy.fetch_add(1, Ordering::Relaxed);
                let sender = sender.clone();
                std::thread::spawn(move || desk.serve(stream, &sender));
            }
        });
        Self { expected, results, _desk: desk }
    }
}

impl Desk {
    fn serve(&self, mut stream: TcpStream, sender: &Sender<Call>) {
        let from = stream.peer_addr().map_or_else(|_| "somebody".to_owned(), |address| address.to_string());
        let result = limit(&stream)
            .and_then(|()| receive(&mut stream, &self.secret, &self.identity, |caller| self.judge(caller)))
            .map(|introduction| (introduction, stream))
            .map_err(|error| format!("refused {from}: {error}"));
        self.busy.fetch_sub(1, Ordering::Relaxed);
        // After the meeting nobody is interested.
        let _ = sender.send(result);
    }

    /// The first of each rank is welcome.
    fn judge(&self, caller: Introduction) -> std::result::Result<(), String> {
        let (rank, world_size) = (caller.rank as usize, caller.world_size as usize);
        if world_size != self.world_size {
            return Err(format!("it counts {world_size} ranks, but there are {}", self.world_size));
        }
        if !self.expected.contains(&rank) {
            return Err(format!("rank {rank} does not call here; ranks {:?} do", self.expected));
        }
        let mut joined = self.joined.lock().unwrap_or_else(PoisonError::into_inner);
        if joined[rank] {
            return Err(format!("rank {rank} is here already"));
        }
        joined[rank] = true;
        Ok(())
    }
}
