//! Arithmetic on rows: sums in sixteen lanes with a fixed tree, and an exponential, so that the compiler
//! vectorises them and every machine gives the same bits.

const LANES: usize = 16;

/// Sums `term(i)` over a row: lane j takes the elements i = j mod 16 in order, then the lanes add up in a tree.
#[inline(always)]
fn reduce(a: &[f32], b: &[f32], term: impl Fn(f32, f32, f32) -> f32) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
    for (a, b) in a_chunks.zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] = term(lanes[lane], a[lane], b[lane]);
        }
    }
    for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[lane] = term(lanes[lane], *a, *b);
    }
    tree_sum(lanes)
}

#[inline(always)]
fn tree_sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Sum of the products of two rows.
#[inline]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    reduce(a, b, |sum, a, b| a.mul_add(b, sum))
}

/// Sum of the products of three rows.
#[inline]
pub fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    debug_assert!(a.len() == b.len() && a.len() == c.len());
    let mut lanes = [0.0f32; LANES];
    let whole = a.len() - a.len() % LANES;
    for start in (0..whole).step_by(LANES) {
        let (a, b, c) = (&a[start..][..LANES], &b[start..][..LANES], &c[start..][..LANES]);
        for lane in 0..LANES {
            lanes[lane] = (a[lane] * b[lane]).mul_add(c[lane], lanes[lane]);
        }
    }
    for (lane, i) in (whole..a.len()).enumerate() {
        lanes[lane] = (a[i] * b[i]).mul_add(c[i], lanes[lane]);
    }
    tree_sum(lanes)
}

/// Sum of a row.
#[inline]
pub fn sum(a: &[f32]) -> f32 {
    reduce(a, a, |sum, a, _| sum + a)
}

/// Largest element of a row; negative infinity when it is empty.
#[inline]
pub fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = a.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// `y += scale * x`
#[inline]
pub fn add_scaled(y: &mut [f32], x: &[f32], scale: f32) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.mul_add(scale, *y);
    }
}

/// e^x to within 2 units in the last place for x in -87..88; outside it saturates near the ends of that range.
///
/// Cody and Waite's reduction x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 6 in r, and 2^n put
/// together from bits. Written in multiply-adds, without a branch, so that a loop over it vectorises.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: the first has trailing zeros, so that n * LN2_HIGH is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_HIGH, x);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = 1.0 / 720.0f32;
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p.mul_add(r, coefficient);
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    p * power
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::uniform;

    #[test]
    fn exp_is_within_two_ulps() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let reference = f64::from(x).exp();
            let error = (f64::from(exp(x)) - reference).abs() / reference;
            assert!(error < 2.4e-7, "exp({x}) is off by {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-1e9) < 1e-37 && exp(1e9) > 1e38);
    }

    #[test]
    fn rows_of_any_length_sum_as_in_f64() {
        for len in [0, 1, 15, 16, 17, 100, 1000] {
            let (a, b) = (uniform(1, len), uniform(2, len));
            let reference: f64 = a.iter().zip(&b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            assert!((f64::from(dot(&a, &b)) - reference).abs() < 1e-5 * (len as f64 + 1.0));
            let reference: f64 = a.iter().map(|a| f64::from(*a)).sum();
            assert!((f64::from(sum(&a)) - reference).abs() < 1e-5 * (len as f64 + 1.0));
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}
