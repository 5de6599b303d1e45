//! Numbers with a unit suffix: `10B` tokens, `64M` bytes.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

/// Largest quantity: what a Kubernetes integer holds.
const MAX: u64 = i64::MAX as u64;

/// Longest text of a quantity.
const MAX_LENGTH: usize = 32;

const PATTERN: &str = r"^[0-9]+(\.[0-9]+)?[kKMBGT]?$";
const PATTERN_OR_AUTO: &str = r"^(auto|[0-9]+(\.[0-9]+)?[kKMBGT]?)$";

/// A number of tokens; written as an integer or with a decimal suffix: `500K`, `97.5B`, `2T`.
#[derive(Serialize, Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[serde(transparent)]
pub struct TokenCount(pub u64);

/// A number of bytes; written as an integer or with a decimal suffix: `64M`, `1.5G`.
#[derive(Serialize, Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[serde(transparent)]
pub struct ByteCount(pub u64);

/// Tokens of a stage: a count, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StageTokens {
    /// The paper's growth-timing guideline decides.
    Auto,
    /// Exactly this many, rounded up to whole steps.
    Count(TokenCount),
}

/// Why a quantity cannot be read.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq)]
pub enum QuantityError {
    /// It is no number with a known unit.
    #[error("{text:?} is not a number; write an integer or a decimal with one of K, M, B, G, T: 500K, 97.5B")]
    Syntax {
        /// What was written.
        text: String,
    },
    /// The unit does not turn it into a whole number.
    #[error("{text:?} is not a whole number; write fewer decimals or a larger unit: 1500 or 1.5K")]
    Fraction {
        /// What was written.
        text: String,
    },
    /// It is larger than any Kubernetes integer.
    #[error("{text:?} is too large; the largest quantity is {MAX} (about 9.2M of T)")]
    Overflow {
        /// What was written.
        text: String,
    },
}

fn factor(unit: &str) -> Option<u64> {
    match unit {
        "" => Some(1),
        "k" | "K" => Some(1_000),
        "M" => Some(1_000_000),
        "B" | "G" => Some(1_000_000_000),
        "T" => Some(1_000_000_000_000),
        _ => None,
    }
}

fn digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Reads `97.5B` exactly, without a detour over floating point.
fn parse(text: &str) -> Result<u64, QuantityError> {
    let syntax = || QuantityError::Syntax { text: text.chars().take(MAX_LENGTH).collect() };
    let overflow = || QuantityError::Overflow { text: text.to_owned() };
    if text.len() > MAX_LENGTH {
        return Err(syntax());
    }
    let split = text.find(|character: char| character.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let factor = factor(unit).ok_or_else(syntax)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if !digits(whole) || !digits(fraction) {
        return Err(syntax());
    }
    let whole: u64 = whole.parse().map_err(|_| overflow())?;
    let fraction = fraction.trim_end_matches('0');
    let value = u128::from(whole) * u128::from(factor) + parse_fraction(text, fraction, factor)?;
    u64::try_from(value).ok().filter(|value| *value <= MAX).ok_or_else(overflow)
}

fn parse_fraction(text: &str, fraction: &str, factor: u64) -> Result<u128, QuantityError> {
    if fraction.is_empty() {
        return Ok(0);
    }
    let error = || QuantityError::Fraction { text: text.to_owned() };
    let numerator: u128 = fraction.parse().map_err(|_| error())?;
    let denominator = u32::try_from(fraction.len()).ok().and_then(|places| 10u128.checked_pow(places));
    let denominator = denominator.ok_or_else(error)?;
    let scaled = numerator.checked_mul(u128::from(factor)).ok_or_else(error)?;
    if scaled % denominator != 0 {
        return Err(error());
    }
    Ok(scaled / denominator)
}

/// The shortest text that reads back as exactly this number; an integer unless a unit makes it shorter.
fn shortest(value: u64, billion: &str) -> String {
    let mut best = value.to_string();
    for (unit, factor) in
        [("K", 1_000u64), ("M", 1_000_000), (billion, 1_000_000_000), ("T", 1_000_000_000_000)]
    {
        let places = factor.ilog10() as usize;
        let decimals = format!("{:0places$}", value % factor);
        let decimals = decimals.trim_end_matches('0');
        let point = if decimals.is_empty() { "" } else { "." };
        let text = format!("{}{point}{decimals}{unit}", value / factor);
        // 0.5K is no shorter than 500 to a reader.
        if value >= factor && text.len() <= best.len() {
            best = text;
        }
    }
    best
}

/// Reads an integer or a text.
struct QuantityVisitor;

impl de::Visitor<'_> for QuantityVisitor {
    type Value = StageTokens;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a whole number, or a text such as 500K or 97.5B")
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<StageTokens, E> {
        if value > MAX {
            return Err(E::custom(QuantityError::Overflow { text: value.to_string() }));
        }
        Ok(StageTokens::Count(TokenCount(value)))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<StageTokens, E> {
        let value = u64::try_from(value)
            .map_err(|_| E::custom(format!("{value} is negative; write a number from 0 up")))?;
        self.visit_u64(value)
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<StageTokens, E> {
        // YAML readers hand over 1e9 as a float; 2^53 is where floats stop being exact.
        if value.fract() != 0.0 || !(0.0..=9_007_199_254_740_992.0).contains(&value) {
            return Err(E::custom(QuantityError::Fraction { text: value.to_string() }));
        }
        self.visit_u64(value as u64)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<StageTokens, E> {
        text.parse().map_err(E::custom)
    }
}

macro_rules! quantity {
    ($type:ident, $billion:literal, $description:literal) => {
        impl FromStr for $type {
            type Err = QuantityError;

            fn from_str(text: &str) -> Result<Self, QuantityError> {
                parse(text).map(Self)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.pad(&shortest(self.0, $billion))
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                match deserializer.deserialize_any(QuantityVisitor)? {
                    StageTokens::Count(TokenCount(value)) => Ok(Self(value)),
                    StageTokens::Auto => {
                        Err(de::Error::custom(QuantityError::Syntax { text: "auto".to_owned() }))
                    }
                }
            }
        }

        impl JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }

            fn schema_name() -> Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!({
                    "description": $description,
                    "x-kubernetes-int-or-string": true,
                    "pattern": PATTERN,
                    "maxLength": MAX_LENGTH,
                    "minimum": 0,
                })
            }
        }
    };
}

quantity!(TokenCount, "B", "Tokens: an integer, or a decimal with K, M, B or T.");
quantity!(ByteCount, "G", "Bytes: an integer, or a decimal with K, M, G or T (powers of 1000).");

impl FromStr for StageTokens {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        if text == "auto" { Ok(Self::Auto) } else { text.parse().map(Self::Count) }
    }
}

impl fmt::Display for StageTokens {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.pad("auto"),
            Self::Count(count) => count.fmt(formatter),
        }
    }
}

impl Serialize for StageTokens {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Count(count) => count.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for StageTokens {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(QuantityVisitor)
    }
}

impl JsonSchema for StageTokens {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "StageTokens".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "Tokens: an integer, or a decimal with K, M, B or T; or auto.",
            "x-kubernetes-int-or-string": true,
            "pattern": PATTERN_OR_AUTO,
            "maxLength": MAX_LENGTH,
            "minimum": 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(text: &str) -> Result<u64, QuantityError> {
        text.parse::<TokenCount>().map(|count| count.0)
    }

    #[test]
    fn units_are_powers_of_a_thousand() {
        assert_eq!(tokens("0"), Ok(0));
        assert_eq!(tokens("500K"), Ok(500_000));
        assert_eq!(tokens("1k"), Ok(1_000));
        assert_eq!(tokens("97.5B"), Ok(97_500_000_000));
        assert_eq!(tokens("1.50G"), Ok(1_500_000_000));
        assert_eq!(tokens("2T"), Ok(2_000_000_000_000));
        assert_eq!(tokens("9223372036854775807"), Ok(MAX));
    }

    #[test]
    fn errors_say_what_to_write() {
        for text in ["", "K", "1 K", "-1", "1e9", "1m", "1KB", "1.", ".5K", "1.5.2K", "١K", "+1", "0x10"] {
            let error = tokens(text).unwrap_err();
            assert!(matches!(error, QuantityError::Syntax { .. }), "{text}: {error}");
            assert!(error.to_string().contains("97.5B"), "{text}: {error}");
        }
        for text in ["1.5", "0.0001K", "1.2345678901K"] {
            let error = tokens(text).unwrap_err();
            assert!(error.to_string().contains("not a whole number"), "{text}: {error}");
        }
        for text in ["9223372036854775808", "99999999T", "99999999999999999999"] {
            let error = tokens(text).unwrap_err();
            assert!(error.to_string().contains("too large"), "{text}: {error}");
        }
        assert!(matches!(tokens(&"9".repeat(4_000)), Err(QuantityError::Syntax { .. })));
    }

    #[test]
    fn display_is_the_shortest_exact_form() {
        let cases = [
            (0, "0"),
            (500, "500"),
            (1_000, "1K"),
            (1_234, "1234"),
            (2_097_152, "2097152"),
            (97_500_000_000, "97.5B"),
            (1_500_000_000_000, "1.5T"),
            (10_485_760_000, "10.48576B"),
        ];
        for (count, text) in cases {
            assert_eq!(TokenCount(count).to_string(), text);
        }
        assert_eq!(ByteCount(64_000_000_000).to_string(), "64G");
        assert_eq!(format!("{:>6}", TokenCount(1_000)), "    1K");
    }

    #[test]
    fn integers_and_texts_are_read() {
        assert_eq!(serde_json::from_str::<TokenCount>("4096").unwrap(), TokenCount(4096));
        assert_eq!(serde_json::from_str::<TokenCount>("\"4K\"").unwrap(), TokenCount(4000));
        assert_eq!(serde_json::from_str::<TokenCount>("1e9").unwrap(), TokenCount(1_000_000_000));
        assert_eq!(serde_json::from_str::<StageTokens>("\"auto\"").unwrap(), StageTokens::Auto);
        assert_eq!(serde_json::to_string(&StageTokens::Auto).unwrap(), "\"auto\"");
        assert_eq!(serde_saphyr::from_str::<ByteCount>("1.5G").unwrap(), ByteCount(1_500_000_000));
        assert_eq!(serde_saphyr::from_str::<StageTokens>("97.5B").unwrap().to_string(), "97.5B");
        for wrong in ["-1", "1.5", "\"auto\"", "true", "null", "9223372036854775808"] {
            assert!(serde_json::from_str::<TokenCount>(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn display_reads_back(count in 0..=MAX) {
            prop_assert_eq!(tokens(&TokenCount(count).to_string()), Ok(count));
            prop_assert_eq!(ByteCount(count).to_string().parse(), Ok(ByteCount(count)));
        }

        #[test]
        fn reading_never_panics(text in "\\PC{0,40}") {
            let _ = text.parse::<StageTokens>();
        }

        #[test]
        fn whatever_is_read_matches_the_schema(text in "[0-9]{0,22}(\\.[0-9]{0,12})?[kKMBGTx]?") {
            // A text that the schema refuses must not be read: the cluster and the laptop agree.
            if tokens(&text).is_ok() {
                let (number, unit) = text.split_at(text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).len());
                prop_assert!(unit.len() <= 1 && number.starts_with(|c: char| c.is_ascii_digit()));
                prop_assert!(number.ends_with(|c: char| c.is_ascii_digit()));
            }
        }
    }
}
