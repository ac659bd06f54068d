//! Numbers that look random and come again from the same seed.

use std::time::Duration;

/// A generator (SplitMix64). Tests print the seed, and take another one from the environment.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The generator of `TAILWATER_SEED`, or of `default`. Says which, so that a failure can be seen again.
    pub fn seeded(test: &str, default: u64) -> Self {
        let seed = number_from_environment("TAILWATER_SEED").unwrap_or(default);
        eprintln!("{test}: TAILWATER_SEED={seed}");
        Self(seed)
    }

    /// Another generator, which goes its own way.
    pub fn fork(&mut self) -> Self {
        Self(self.next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from `least` to `most`, both included.
    pub fn between(&mut self, least: u64, most: u64) -> u64 {
        least + self.next() % (most - least + 1)
    }

    /// Yes, once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.next().is_multiple_of(times)
    }
}

/// A whole number in an environment variable.
pub fn number_from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no whole number")))
}

/// Lets a random time pass. There is no event to wait for: that something happens at *any* moment is what the
/// caller tests, and no assertion depends on how long it was.
pub fn let_a_random_moment_pass(random: &mut Random, least: Duration, most: Duration) {
    let micros = |time: Duration| u64::try_from(time.as_micros()).expect("a short time");
    std::thread::sleep(Duration::from_micros(random.between(micros(least), micros(most))));
}
