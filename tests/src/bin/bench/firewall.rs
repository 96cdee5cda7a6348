//! What firewalls cost: connections and packets with more and more rules, compiling, and nftables beside.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use datapath::addr::Ip;
use datapath::keys::{Flow, FlowKey, FlowPath, Line, Token};
use datapath::memory::Memory;
use datapath::packet::{ACK, SYN};
use lab::kernel::interfaces::{POD as POD_IF, UPLINK};
use lab::kernel::{Input, Program};
use lab::packet::tcp;
use outgate::firewall::compile::compile;

use super::shapes::{Shape, compiled, nftables};
use super::{Bench, Figure, Group, POD, POD6, REDIRECT, Rng, SERVER, SHOT, ends, median, tables, tuple_of};

/// Rules of one firewall, and how many firewalls have so many. The second is what the others are compared with.
const SIZES: [(u32, u32); 6] = [(0, 0), (1, 1), (100, 1), (1000, 1), (MOST, 1), (MOST, 13)];
const ONE_RULE: usize = 1;
/// Rules of the largest firewalls. Packets go to what these are for, however few there are.
const MOST: u32 = 8000;
/// How often all sizes are gone through: a machine's speed changes by more than what is to be seen.
const ROUNDS: u32 = 11;

impl Bench {
    /// Connections and packets of a pod, with more and more rules in its firewall and on its node.
    pub(crate) fn firewalls(&mut self, figures: &mut Vec<Figure>, rng: &mut Rng, runs: u32) -> Result<()> {
        for shape in Shape::ALL {
            let all = SIZES.map(|(each, firewalls)| compiled(shape, each, firewalls));
            // By size and round: a first packet's time, and a later one's.
            let mut times = [const { vec![] }; SIZES.len()];
            for _ in 0..ROUNDS {
                for (memory, times) in all.iter().zip(&mut times) {
                    times.push(self.round(shape, memory, rng, runs)?);
                }
            }
            for (which, what) in ["first packet", "later packet"].into_iter().enumerate() {
                let one = &times[ONE_RULE];
                for (n, (each, firewalls)) in SIZES.into_iter().enumerate() {
                    let mut here: Vec<i128> = times[n].iter().map(|round| round[which]).collect();
                    let mut more: Vec<i128> =
                        times[n].iter().zip(one).map(|(a, b)| a[which] - b[which]).collect();
                    here.sort_unstable();
                    more.sort_unstable();
                    let middle = here.len() / 2;
                    figures.push(Figure {
                        group: Group::Firewall,
                        what: format!("{what}, {} rules: {}", each * firewalls, shape.name()),
                        value: format!("{} ns", here[middle]),
                        note: format!(
                            "{:+} ns to one rule, by round {:+} to {:+}; {} KiB of rules; {ROUNDS} rounds of {runs}",
                            more[middle],
                            more[0],
                            more[more.len() - 1],
                            all[n].rules.len() * size_of::<Line>() / 1024
                        ),
                    });
                }
            }
        }
        self.kernel.write_policy(&tables(1));
        Ok(())
    }

    /// Medians of a first packet's and a later packet's time, in nanoseconds, with these firewalls.
    fn round(&mut self, shape: Shape, memory: &Memory, rng: &mut Rng, runs: u32) -> Result<[i128; 2]> {
        let firewall = u32::from(!memory.firewalls.is_empty());
        self.kernel.put_firewalls(memory);
        let mut policy = tables(1);
        policy.pods.values_mut().for_each(|pod| pod.firewall = firewall);
        self.kernel.write_policy(&policy);
        // Flows are taken out one by one below, which does not count them.
        for pod in [1, 2] {
            self.kernel.set_pod_flows(pod, 0);
        }
        let (mut first, mut later) = (vec![], vec![]);
        for nth in 0..runs {
            let to = shape.destination(rng.below(MOST));
            let (new, packet) = self.connection(memory, firewall, 20_000 + (nth % 20_000) as u16, to)?;
            first.push(new);
            later.push(packet);
        }
        self.kernel.take_firewalls(memory);
        Ok([&mut first, &mut later].map(|times| median(times).as_nanos().cast_signed()))
    }

    /// A connection's first packet through both programs, and a later one: times of both.
    fn connection(
        &mut self,
        memory: &Memory,
        firewall: u32,
        port: u16,
        to: (Ip, u16),
    ) -> Result<(Duration, Duration)> {
        // The pod's number and address of the destination's family.
        let (pod, ip) = if to.0.is_v4() { (1, Ip::v4(POD)) } else { (2, POD6) };
        let from = (ip, port);
        let mut input = Input { frame: tcp(from, to, SYN).frame(), ifindex: POD_IF, ..Input::default() };
        let (done, out) = self.kernel.timed(Some(Program::FromPod), &input, &mut self.frame);
        ensure!(done == -1, "from_pod gave back {done} for a first packet");
        let (number, tuple) = (0x4000_0000 | u32::from(port), tuple_of(from, to));
        self.kernel.put_token(number, &Token { pod, policy: 1, firewall, tuple, direct: 0 });
        (input.ifindex, input.ingress, input.hash) = (UPLINK, POD_IF, number);
        let (done, up) = self.kernel.timed(Some(Program::ToUplink), &input, &mut self.frame);
        ensure!(done != SHOT, "to_uplink dropped what goes to {}", IpAddr::from(to.0));

        let later = Input {
            frame: tcp(from, to, ACK).payload(&[7; 64]).frame(),
            ifindex: POD_IF,
            ..Input::default()
        };
        let (done, packet) = self.kernel.timed(Some(Program::FromPod), &later, &mut self.frame);
        ensure!(done == REDIRECT, "from_pod gave back {done} for a later packet");
        let key = FlowKey {
            pod,
            remote: to.0,
            remote_port: to.1,
            path: FlowPath::Offloaded as u8,
            ..ends(SERVER, port, 0).0
        };
        let flow: Flow = self.kernel.take_flow(&key).context("no flow was made")?;
        let expected = memory.firewalls.get(&firewall).copied().unwrap_or(0);
        ensure!(flow.ruleset == expected, "the flow was judged by version {}, not {expected}", flow.ruleset);
        Ok((out + up, packet))
    }
}

/// Compiling, without apply.
pub(crate) fn compiling(figures: &mut Vec<Figure>, runs: u32) -> Result<()> {
    for shape in Shape::ALL {
        let rules = shape.rules(MOST, 0);
        let mut times = vec![];
        for _ in 0..runs {
            let start = Instant::now();
            std::hint::black_box(compile(&rules, &mut |_| 0)?);
            times.push(start.elapsed());
        }
        figures.push(Figure {
            group: Group::Firewall,
            what: format!("compiling, {MOST} rules: {}", shape.name()),
            value: format!("{:.2} ms", median(&mut times).as_secs_f64() * 1e3),
            note: format!("{runs} runs"),
        });
    }
    Ok(())
}

/// The same rules as nftables has them, one after another: what a datagram costs that all are asked about, sent to a
/// device that drops it. Beside the other figures: what is more than without rules a connection's first packet pays.
pub(crate) fn nft(figures: &mut Vec<Figure>, rng: &mut Rng, packets: u32) -> Result<()> {
    // A bridge without ports.
    sh("set -e
        ip link add sink type bridge
        ip link set sink up
        ip addr add 192.0.2.202/30 dev sink
        ip neigh add 192.0.2.201 lladdr 02:00:00:00:00:99 dev sink nud permanent
        ip route add 20.0.0.0/8 via 192.0.2.201 dev sink
        ip addr add fd00:2::2/64 dev sink nodad
        ip neigh add fd00:2::1 lladdr 02:00:00:00:00:99 dev sink nud permanent
        ip route add fd00:20::/32 via fd00:2::1 dev sink")?;
    for shape in Shape::ALL {
        let mut base = None;
        let (family, from) =
            if shape == Shape::Hosts6 { ("ip6", "[fd00:2::2]:0") } else { ("ip", "192.0.2.202:0") };
        let socket = UdpSocket::bind(from)?;
        for each in [0, 1, 100, 1000, MOST] {
            load(&nftables(family, &shape.rules(each, 0)))?;
            let mut times = vec![];
            for _ in 0..packets {
                let (address, port) = shape.destination(rng.below(MOST));
                let to = SocketAddr::new(address.into(), port);
                let start = Instant::now();
                socket.send_to(&[7; 64], to).context("a datagram to the device that drops all")?;
                times.push(start.elapsed());
            }
            sh(&format!("nft delete table {family} bench"))?;
            let time = median(&mut times).as_nanos();
            let base = *base.get_or_insert(time);
            figures.push(Figure {
                group: Group::Firewall,
                what: format!("nftables, {each} rules: {}", shape.name()),
                value: format!("{time} ns"),
                note: format!(
                    "{:+} ns to none; {packets} datagrams",
                    time.cast_signed() - base.cast_signed()
                ),
            });
        }
    }
    sh("ip link del sink")
}

fn sh(script: &str) -> Result<()> {
    let status = Command::new("sh").args(["-c", script]).status().context("sh")?;
    ensure!(status.success(), "failed: {script}");
    Ok(())
}

fn load(script: &str) -> Result<()> {
    let mut nft = Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().context("nft")?;
    nft.stdin.take().context("nft's input")?.write_all(script.as_bytes())?;
    ensure!(nft.wait()?.success(), "nft refused the rules");
    Ok(())
}
