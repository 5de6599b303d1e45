//! A growth factor: a number, or `auto`.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

/// Smallest and largest factor of the API.
const LEAST: u32 = 2;
const MOST: u32 = 64;

/// How many times something is multiplied at a growth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrowthFactor {
    /// The paper's guideline decides.
    Auto,
    /// So many times.
    Times(u32),
}

/// The text is neither `auto` nor a whole number.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq)]
#[error("{text:?} is no factor; write a whole number from {LEAST} to {MOST}, or auto")]
pub struct FactorError {
    /// What was written.
    text: String,
}

impl FromStr for GrowthFactor {
    type Err = FactorError;

    fn from_str(text: &str) -> Result<Self, FactorError> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        text.parse().map(Self::Times).map_err(|_| FactorError { text: text.chars().take(32).collect() })
    }
}

impl fmt::Display for GrowthFactor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.pad("auto"),
            Self::Times(factor) => factor.fmt(formatter),
        }
    }
}

impl Serialize for GrowthFactor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Times(factor) => serializer.serialize_u32(*factor),
        }
    }
}

impl<'de> Deserialize<'de> for GrowthFactor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(FactorVisitor)
    }
}

struct FactorVisitor;

impl de::Visitor<'_> for FactorVisitor {
    type Value = GrowthFactor;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a whole number from {LEAST} to {MOST}, or auto")
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<GrowthFactor, E> {
        let wrong = |_| E::custom(FactorError { text: value.to_string() });
        u32::try_from(value).map(GrowthFactor::Times).map_err(wrong)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<GrowthFactor, E> {
        let wrong = |_| E::custom(FactorError { text: value.to_string() });
        u32::try_from(value).map(GrowthFactor::Times).map_err(wrong)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<GrowthFactor, E> {
        match text {
            "auto" => Ok(GrowthFactor::Auto),
            // As the schema: a number in quotes is no number.
            _ => Err(E::custom(FactorError { text: text.chars().take(32).collect() })),
        }
    }
}

impl JsonSchema for GrowthFactor {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "GrowthFactor".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A whole number, or auto.",
            "x-kubernetes-int-or-string": true,
            "pattern": "^auto$",
            "maxLength": 4,
            "minimum": LEAST,
            "maximum": MOST,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_auto_are_read_and_written_as_they_were() {
        for (text, factor) in [("4", GrowthFactor::Times(4)), ("\"auto\"", GrowthFactor::Auto)] {
            assert_eq!(serde_json::from_str::<GrowthFactor>(text).unwrap(), factor);
            assert_eq!(serde_json::to_string(&factor).unwrap(), text);
        }
        for wrong in ["-1", "2.5", "\"4\"", "\"Auto\"", "true", "99999999999"] {
            assert!(serde_json::from_str::<GrowthFactor>(wrong).is_err(), "{wrong}");
        }
        assert_eq!("auto".parse(), Ok(GrowthFactor::Auto));
        assert_eq!("8".parse(), Ok(GrowthFactor::Times(8)));
        let error = "four".parse::<GrowthFactor>().unwrap_err();
        assert_eq!(error.to_string(), "\"four\" is no factor; write a whole number from 2 to 64, or auto");
    }
}
