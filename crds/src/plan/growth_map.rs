//! Which source layer every target layer copies.

use std::collections::BTreeSet;

/// Most layers a model may have.
pub const MAX_LAYERS: u32 = 1024;

/// G_stack: the whole model, `factor` times.
pub fn stack(source_layers: u32, factor: u32) -> Vec<u32> {
    repeat(source_layers, source_layers.saturating_mul(factor))
}

/// The whole model again and again, until there are `target_layers`: target layer i is source layer i mod L.
pub fn repeat(source_layers: u32, target_layers: u32) -> Vec<u32> {
    (0..source_layers).cycle().take(target_layers as usize).collect()
}

/// Every layer about equally often, in its place: target layer i of L' is source layer floor(i L / L').
pub fn interleave(source_layers: u32, target_layers: u32) -> Vec<u32> {
    let source = |target: u32| u64::from(target) * u64::from(source_layers) / u64::from(target_layers);
    // Below `source_layers`, for a target is below `target_layers`.
    (0..target_layers).map(|target| source(target) as u32).collect()
}

/// SOLAR: the model without its last `dropped` layers, then the model without its first.
pub fn solar(source_layers: u32, dropped: u32) -> Option<Vec<u32>> {
    let kept = source_layers.checked_sub(dropped).filter(|kept| *kept > 0)?;
    Some((0..kept).chain(dropped..source_layers).collect())
}

/// MIDAS: the middle block (of an even number the lower one) is repeated right above itself.
pub fn midas(source_layers: u32, block: u32) -> Option<Vec<u32>> {
    if block == 0 || source_layers == 0 || !source_layers.is_multiple_of(block) {
        return None;
    }
    let middle = (source_layers / block).div_ceil(2) * block;
    Some((0..middle).chain(middle - block..source_layers).collect())
}

/// LIDAS: the last half of the block below the middle and the first half of the one above it, repeated in the middle.
pub fn lidas(source_layers: u32, block: u32) -> Option<Vec<u32>> {
    let even = source_layers.is_multiple_of(2) && block.is_multiple_of(2);
    if block == 0 || !even || block > source_layers {
        return None;
    }
    let middle = source_layers / 2;
    Some((0..middle).chain(middle - block / 2..middle + block / 2).chain(middle..source_layers).collect())
}

/// LLaMA Pro: after each of `groups` equal groups its last `copies` layers again.
pub fn llama_pro(source_layers: u32, groups: u32, copies: u32) -> Option<Vec<u32>> {
    if groups == 0 || source_layers == 0 || !source_layers.is_multiple_of(groups) {
        return None;
    }
    let group = source_layers / groups;
    if copies == 0 || copies > group {
        return None;
    }
    let ends = (1..=groups).map(|number| number * group);
    Some(ends.flat_map(|end| (end - group..end).chain(end - copies..end)).collect())
}

/// Target layers that are not the first copy of their source.
pub fn further_copies(layers: &[u32]) -> Vec<u32> {
    let mut seen = BTreeSet::new();
    (0u32..).zip(layers).filter(|(_, source)| !seen.insert(**source)).map(|(target, _)| target).collect()
}

/// Why a pattern cannot be read.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq)]
pub enum PatternError {
    /// A part is not digits with an optional repetition.
    #[error(
        "{part:?} is no part of a pattern; write layers as digits from 1, with *n to repeat: 12-3456*5-56"
    )]
    Syntax {
        /// The part.
        part: String,
    },
    /// It describes more layers than a model may have.
    #[error("the pattern makes more than {MAX_LAYERS} layers; lower the repetitions")]
    TooLong,
}

/// Reads the paper's notation `12-3456*5-56` (layers from 1, one digit each) into layers from 0.
///
/// # Errors
/// When a part is not digits 1 to 9 with an optional `*n`, or when the result is too long.
pub fn parse_pattern(pattern: &str) -> Result<Vec<u32>, PatternError> {
    let mut layers = Vec::new();
    for part in pattern.split('-') {
        let (block, times) =
            parse_part(part).ok_or_else(|| PatternError::Syntax { part: part.to_owned() })?;
        if u64::from(times) * block.len() as u64 + layers.len() as u64 > u64::from(MAX_LAYERS) {
            return Err(PatternError::TooLong);
        }
        (0..times).for_each(|_| layers.extend(&block));
    }
    Ok(layers)
}

fn parse_part(part: &str) -> Option<(Vec<u32>, u32)> {
    let (digits, times) = part.split_once('*').unwrap_or((part, "1"));
    let block: Option<Vec<u32>> =
        digits.chars().map(|digit| digit.to_digit(10)?.checked_sub(1)).collect::<Option<_>>();
    let times: u32 = times.parse().ok().filter(|times| *times > 0)?;
    block.filter(|block| !block.is_empty()).map(|block| (block, times))
}

/// The paper's connection rate R_c as a fraction: neighbours of the source that are still neighbours, of all pairs.
pub fn connection_rate(layers: &[u32]) -> (usize, usize) {
    let kept = layers.windows(2).filter(|pair| pair[0].checked_add(1) == Some(pair[1])).count();
    (kept, layers.len().saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stack_repeats_the_whole_model() {
        let layers = stack(6, 4);
        assert_eq!(layers.len(), 24);
        assert!(layers.iter().enumerate().all(|(target, source)| *source == target as u32 % 6));
    }

    #[test]
    fn the_papers_partial_stacks() {
        // Table 5, "a-bcd*k-ef": how many of 23 pairs are kept.
        let table = [
            ("123456*4", 20),
            ("12-3456*5-56", 18),
            ("12-345*7-6", 17),
            ("123-456*7", 17),
            ("1234-56*10", 14),
            ("12-34*10-56", 14),
            ("1-234*7-56", 17),
            ("123*7-456", 17),
        ];
        for (pattern, kept) in table {
            let layers = parse_pattern(pattern).unwrap();
            assert_eq!(layers.len(), 24, "{pattern}");
            assert_eq!(connection_rate(&layers), (kept, 23), "{pattern}");
        }
    }

    #[test]
    fn stack_and_interleave_of_eight_layers() {
        assert_eq!(connection_rate(&stack(8, 3)), (21, 23));
        let interleaved = interleave(8, 24);
        assert!((0u32..).zip(&interleaved).all(|(target, source)| *source == target / 3));
        assert_eq!(connection_rate(&interleaved), (7, 23));
    }

    #[test]
    fn any_depth_is_spread_evenly() {
        assert_eq!(interleave(4, 6), [0, 0, 1, 2, 2, 3]);
        assert_eq!(interleave(3, 4), [0, 0, 1, 2]);
        assert_eq!(repeat(3, 5), [0, 1, 2, 0, 1]);
        for (source, target) in (1u32..20).flat_map(|source| (source..70).map(move |target| (source, target)))
        {
            let layers = interleave(source, target);
            assert!(layers.is_sorted() && layers.len() == target as usize);
            let copies = |layer: u32| layers.iter().filter(|source| **source == layer).count();
            let (least, most) = (target as usize / source as usize, target.div_ceil(source) as usize);
            assert!((0..source).all(|layer| (least..=most).contains(&copies(layer))), "{source} to {target}");
            // What multiples have always given.
            if target % source == 0 {
                let factor = target / source;
                let repeated: Vec<u32> =
                    (0..source).flat_map(|layer| (0..factor).map(move |_| layer)).collect();
                assert_eq!(layers, repeated);
                assert_eq!(repeat(source, target), stack(source, factor));
            }
        }
    }

    #[test]
    fn solar_is_a_list() {
        // Depth up-scaling of 32 layers to 48, dropping 8: 0..=23, then 8..=31.
        let layers = solar(32, 8).unwrap();
        assert_eq!(layers, (0..24).chain(8..32).collect::<Vec<u32>>());
        assert_eq!(connection_rate(&layers), (46, 47));
        assert_eq!(solar(4, 0).unwrap(), stack(4, 2));
        assert_eq!(solar(4, 4), None);
    }

    #[test]
    fn blocks_are_repeated_in_the_middle() {
        assert_eq!(midas(4, 4).unwrap(), [0, 1, 2, 3, 0, 1, 2, 3]);
        assert_eq!(midas(6, 2).unwrap(), [0, 1, 2, 3, 2, 3, 4, 5]);
        assert_eq!(midas(8, 2).unwrap(), [0, 1, 2, 3, 2, 3, 4, 5, 6, 7]);
        assert_eq!(midas(6, 4), None);
        assert_eq!(lidas(8, 4).unwrap(), [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7]);
        assert_eq!(lidas(4, 4).unwrap(), [0, 1, 0, 1, 2, 3, 2, 3]);
        for (layers, block) in [(7, 2), (8, 3), (4, 6), (4, 0)] {
            assert_eq!(lidas(layers, block), None);
        }
        // From 4 to 32 layers, four at a time.
        let depths = std::iter::successors(Some(4), |depth| midas(*depth, 4).map(|list| list.len() as u32));
        assert_eq!(depths.take(8).last(), Some(32));
    }

    #[test]
    fn llama_pro_repeats_the_end_of_every_group() {
        let layers = llama_pro(32, 8, 1).unwrap();
        assert_eq!(layers.len(), 40);
        assert_eq!(layers[..6], [0, 1, 2, 3, 3, 4]);
        assert_eq!(further_copies(&layers), [4, 9, 14, 19, 24, 29, 34, 39]);
        assert_eq!(llama_pro(4, 2, 2).unwrap(), [0, 1, 0, 1, 2, 3, 2, 3]);
        for (groups, copies) in [(3, 1), (2, 3), (0, 1), (2, 0)] {
            assert_eq!(llama_pro(4, groups, copies), None);
        }
    }

    #[test]
    fn wrong_patterns_say_what_to_write() {
        for pattern in ["", "0", "12-", "-1", "1*0", "1*", "a", "1**2", "1*2*3", "12 34", "1*99999999999"] {
            let error = parse_pattern(pattern).unwrap_err();
            assert!(error.to_string().contains("12-3456*5-56"), "{pattern}: {error}");
        }
        assert_eq!(parse_pattern("12*600"), Err(PatternError::TooLong));
        assert_eq!(parse_pattern("12*4000000000"), Err(PatternError::TooLong));
    }
}
