//! Where in a YAML text a field stands.

use super::Problem;
use saphyr_parser::{Event, Parser};
use std::collections::HashMap;

/// Line and column, from 1, of every field path of a document.
#[derive(Debug)]
pub struct Positions(HashMap<String, (usize, usize)>);

/// A mapping or sequence that is being read.
enum Open {
    Mapping { path: String, key: Option<String> },
    Sequence { path: String, index: usize },
}

impl Positions {
    /// Positions of the first document of `text`.
    ///
    /// # Errors
    /// Where the text is not YAML.
    pub fn of(text: &str) -> Result<Self, Problem> {
        let mut found = HashMap::new();
        let mut open: Vec<Open> = Vec::new();
        for event in Parser::new_from_str(text) {
            let (event, span) = event.map_err(|error| Problem {
                field: String::new(),
                message: format!("is not valid YAML: {}", error.info()),
                position: Some((error.marker().line(), error.marker().col() + 1)),
            })?;
            let position = (span.start.line(), span.start.col() + 1);
            match event {
                Event::Scalar(text, ..) if expects_key(&open) => {
                    let path = set_key(&mut open, text.into_owned());
                    found.insert(path, position);
                }
                Event::Scalar(..) | Event::Alias(_) => {
                    let path = value_path(&mut open);
                    found.entry(path).or_insert(position);
                }
                Event::MappingStart(..) => {
                    let path = value_path(&mut open);
                    found.entry(path.clone()).or_insert(position);
                    open.push(Open::Mapping { path, key: None });
                }
                Event::SequenceStart(..) => {
                    let path = value_path(&mut open);
                    found.entry(path.clone()).or_insert(position);
                    open.push(Open::Sequence { path, index: 0 });
                }
                Event::MappingEnd | Event::SequenceEnd => {
                    open.pop();
                }
                Event::DocumentEnd => break,
                _ => {}
            }
        }
        Ok(Self(found))
    }

    /// Gives a problem the position of its field, or of the nearest field around it that is written down.
    pub fn place(&self, problem: Problem) -> Problem {
        let mut field = problem.field.as_str();
        loop {
            if let Some(position) = self.0.get(field) {
                return Problem { position: Some(*position), ..problem };
            }
            match field.rfind(['.', '[']) {
                Some(end) => field = &field[..end],
                None => return problem,
            }
        }
    }
}

fn expects_key(open: &[Open]) -> bool {
    matches!(open.last(), Some(Open::Mapping { key: None, .. }))
}

fn set_key(open: &mut [Open], name: String) -> String {
    let Some(Open::Mapping { path, key }) = open.last_mut() else { return name };
    let field = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
    *key = Some(name);
    field
}

/// Path of the value that begins now.
fn value_path(open: &mut [Open]) -> String {
    match open.last_mut() {
        None => String::new(),
        Some(Open::Mapping { path, key }) => match key.take() {
            Some(key) if path.is_empty() => key,
            Some(key) => format!("{path}.{key}"),
            None => path.clone(),
        },
        Some(Open::Sequence { path, index }) => {
            *index += 1;
            format!("{path}[{}]", *index - 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "a: 1\nb:\n- c: x\n  d: [1, 2]\n- {c: y}\n";

    #[test]
    fn finds_fields_by_path() {
        let positions = Positions::of(TEXT).unwrap();
        let at = |field: &str| positions.place(Problem::of_field(field.to_owned(), String::new())).position;
        assert_eq!(at("a"), Some((1, 1)));
        assert_eq!(at("b[0].c"), Some((3, 3)));
        assert_eq!(at("b[0].d[1]"), Some((4, 10)));
        assert_eq!(at("b[1].c"), Some((5, 4)));
        assert_eq!(at("b[1].missing.deeper"), Some((5, 3)), "the nearest field around it");
        assert_eq!(at("nowhere"), None);
    }

    #[test]
    fn a_syntax_error_has_its_place() {
        let problem = Positions::of("a: [1\nb: 2").err().unwrap();
        assert!(problem.position.is_some() && problem.message.contains("YAML"), "{problem:?}");
    }
}
