//! How long to wait before the next try.

use std::time::Duration;

/// First wait.
const FIRST: Duration = Duration::from_millis(100);
/// Longest wait: long enough to spare a struggling server, short enough to be back soon after it.
const LONGEST: Duration = Duration::from_secs(15);

/// Exponential back-off with jitter: 0.1 s, doubling to 15 s, each ± 20 %, so that many clients of one server
/// do not come back all at once.
#[derive(Debug)]
pub(crate) struct BackOff {
    failures: u32,
    random: u64,
}

impl BackOff {
    pub(crate) fn new(seed: u64) -> Self {
        Self { failures: 0, random: seed | 1 }
    }

    /// The next wait.
    pub(crate) fn wait(&mut self) -> Duration {
        let wait = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures += 1;
        // xorshift64: any spread will do.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        wait.mul_f64(0.8 + 0.4 * (self.random % 1000) as f64 / 1000.0)
    }

    /// It worked: the next wait is the first again.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_a_limit_with_jitter() {
        let mut back_off = BackOff::new(7);
        let waits: Vec<f64> = (0..12).map(|_| back_off.wait().as_secs_f64()).collect();
        for (failures, wait) in waits.iter().enumerate() {
            let middle = (0.1 * f64::from(1 << failures)).min(15.0);
            assert!((middle * 0.8..=middle * 1.2).contains(wait), "{failures}: {wait}");
        }
        back_off.reset();
        assert!(back_off.wait().as_secs_f64() <= 0.12);
    }
}
