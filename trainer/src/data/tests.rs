//! The pipeline as a whole: files in, the same tokens out, whatever happens in between.

use super::prepare::{Sizes, prepare_sized};
use super::shards::{INDEX, Index};
use super::*;
use crate::storage::{Storage, StorageOptions};
use ::parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;
use growth_crds::quantity::ByteCount;
use growth_crds::spec::data::{DataFormat, DataSource, DataSpec, TokenizerSpec, TrainTokenizerSpec};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// The program's own: the figures of `measure` depend on it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A folder of sources and a folder of results.
struct Setup {
    folder: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.folder.path().join("in").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        self
    }

    fn uri(&self, name: &str) -> String {
        format!("file://{}/in/{name}", self.folder.path().display())
    }

    fn source(&self, name: &str) -> DataSource {
        DataSource { uri: self.uri(name), weight: 1.0, format: None, field: "text".into(), max_bytes: None }
    }

    fn storage(&self, name: &str) -> Storage {
        let path = self.folder.path().join(name);
        Storage::open(path.to_str().unwrap(), &StorageOptions::default()).unwrap()
    }

    /// Training text as named, validation from `v.txt`.
    fn spec(&self, names: &[&str]) -> DataSpec {
        self.write("v.txt", "the validation text, long enough for some tokens of its own");
        DataSpec {
            train: names.iter().map(|name| self.source(name)).collect(),
            validation: vec![self.source("v.txt")],
            hold_out_percent: None,
            tokenizer: TokenizerSpec { uri: None, train: Some(bpe(300)) },
            document_separator: None,
        }
    }

    fn prepare(&self, spec: &DataSpec) -> Result<Dataset> {
        prepare(spec, &self.storage("out"), &StorageOptions::default(), 1, &|_| {})
    }

    fn error(&self, spec: &DataSpec) -> String {
        self.prepare(spec).unwrap_err().to_string()
    }
}

fn bpe(vocab_size: u32) -> TrainTokenizerSpec {
    TrainTokenizerSpec { vocab_size, sample_bytes: ByteCount(1_000_000) }
}

/// The documents of a training source, in the order of the shards.
fn documents(dataset: &Dataset, source: usize) -> Vec<String> {
    split(dataset, &tokens(dataset, source))
}

fn tokens(dataset: &Dataset, source: usize) -> Vec<u32> {
    let mut tokens = vec![0; dataset.train()[source].tokens as usize];
    dataset.read_train(source, &mut tokens).unwrap();
    tokens
}

fn split(dataset: &Dataset, tokens: &[u32]) -> Vec<String> {
    assert_eq!(tokens.last(), Some(&dataset.tokenizer().separator()));
    let texts = tokens[..tokens.len() - 1].split(|&id| id == dataset.tokenizer().separator());
    texts.map(|ids| dataset.tokenizer().decode(ids).unwrap()).collect()
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

fn zstandard(content: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(content, 3).unwrap()
}

fn parquet_file(texts: &[Option<&str>]) -> Vec<u8> {
    let schema =
        "message rows { required int64 id; optional binary text (UTF8); optional binary url (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut file = Vec::new();
    let mut writer =
        SerializedFileWriter::new(&mut file, schema, Arc::new(WriterProperties::default())).unwrap();
    for texts in texts.chunks(40) {
        let mut group = writer.next_row_group().unwrap();
        let ids: Vec<i64> = (0..texts.len() as i64).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let levels: Vec<i16> = texts.iter().map(|text| i16::from(text.is_some())).collect();
        let values: Vec<ByteArray> = texts.iter().flatten().map(|text| ByteArray::from(*text)).collect();
        for _ in 0..2 {
            let mut column = group.next_column().unwrap().unwrap();
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            column.close().unwrap();
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
    file
}

const TEXTS: [&str; 4] = ["first of all", "a second\nline", "naïve 漢字 \"quoted\"", "the end\n"];

fn json_lines() -> String {
    let line =
        |text: &&str| format!("{}\n", serde_json::json!({"id": 3, "text": text, "more": {"text": "no"}}));
    TEXTS.iter().map(line).collect()
}

#[test]
fn every_format_gives_the_same_documents() {
    let setup = Setup::new();
    let lines = json_lines();
    setup.write("a.jsonl", &lines).write("a.jsonl.gz", gzip(lines.as_bytes()));
    setup.write("a.jsonl.zst", zstandard(lines.as_bytes())).write("lines", &lines);
    setup.write("a.parquet", parquet_file(&TEXTS.map(Some)));
    for (i, text) in TEXTS.iter().enumerate() {
        setup.write(&format!("plain/{i}.txt"), text);
        setup.write(&format!("gz/{i}.txt.gz"), gzip(text.as_bytes()));
        setup.write(&format!("zst/x/{i}.zst"), zstandard(text.as_bytes()));
    }
    let names =
        ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "lines", "a.parquet", "plain/*.txt", "gz/*", "zst/**"];
    let mut spec = setup.spec(&names);
    spec.train[3].format = Some(DataFormat::Jsonl);
    let dataset = setup.prepare(&spec).unwrap();
    for (source, name) in names.iter().enumerate() {
        assert_eq!(documents(&dataset, source), TEXTS, "{name}");
        assert_eq!(dataset.train()[source].documents, 4);
        assert_eq!(dataset.train()[source].bytes, TEXTS.concat().len() as u64);
    }
    assert_eq!(dataset.validation().documents, 1);
}

#[test]
fn file_names_may_be_odd() {
    let setup = Setup::new();
    setup.write("o dd/a [1]é~.txt", "one").write("o dd/b{2}?.txt", "two");
    let dataset = setup.prepare(&setup.spec(&["o dd/*.txt"])).unwrap();
    assert_eq!(documents(&dataset, 0), ["one", "two"]);
}

#[test]
fn parquet_rows_without_text_are_skipped() {
    let setup = Setup::new();
    let texts: Vec<String> = (0..100).map(|i| format!("row {i}")).collect();
    let rows: Vec<Option<&str>> =
        texts.iter().enumerate().map(|(i, text)| (i % 3 != 0).then_some(text.as_str())).collect();
    setup.write("a.parquet", parquet_file(&rows));
    let dataset = setup.prepare(&setup.spec(&["a.parquet"])).unwrap();
    assert_eq!(documents(&dataset, 0), rows.into_iter().flatten().collect::<Vec<_>>());
    assert_eq!(dataset.train()[0].skipped, 34);
}

#[test]
fn what_holds_no_text_is_skipped_and_counted() {
    let setup = Setup::new();
    setup.write("t/a.txt", "text").write("t/b.txt", b"\xff\xfe").write("t/c.txt", "");
    setup.write("l.jsonl", "{\"text\": null}\n\n{\"text\": \"\"}\n  \n{\"text\": \"x\"}");
    let dataset = setup.prepare(&setup.spec(&["t/*", "l.jsonl"])).unwrap();
    assert_eq!(documents(&dataset, 0), ["text"]);
    assert_eq!(documents(&dataset, 1), ["x"]);
    assert_eq!(dataset.train().iter().map(|part| part.skipped).collect::<Vec<_>>(), [2, 2]);
}

#[test]
fn errors_say_where_and_what_to_do() {
    let setup = Setup::new();
    setup.write("good.txt", "good").write("bad.jsonl", "{\"text\": \"a\"}\n{\"text\": 3}\n");
    setup
        .write("other.jsonl", "{\"body\": \"a\", \"id\": 1}\n")
        .write("broken.jsonl", "{\"text\": \"a\"}\n{\"te\n");
    setup.write("latin.jsonl", b"{\"text\": \"caf\xe9\"}\n").write("e/empty.txt", "");
    setup.write("x.parquet", parquet_file(&[Some("a")])).write("torn.txt.gz", &gzip(&[b'a'; 1000])[..20]);
    setup.write("no.parquet", "no parquet").write("x.parquet.gz", "x");
    let check = |name: &str, expected: &[&str]| {
        let error = setup.error(&setup.spec(&["good.txt", name]));
        assert!(expected.iter().all(|part| error.contains(part)), "{error}");
    };
    check("missing.txt", &["spec.data.train[1].uri: ", "missing.txt is no file"]);
    check("e", &["spec.data.train[1].uri: ", "for a folder write a pattern", "/in/e/**"]);
    check("*.csv", &["spec.data.train[1].uri: no file below ", "*.csv"]);
    check("bad.jsonl", &["bad.jsonl line 2: ", "invalid type: integer `3`"]);
    check("other.jsonl", &["line 1: no field \"text\"; set spec.data.train[1].field to one of body, id"]);
    check("broken.jsonl", &["broken.jsonl line 2: EOF while parsing a string at column 4; "]);
    check("latin.jsonl", &["latin.jsonl line 1: not UTF-8 from byte 14 on"]);
    check("e/*", &["spec.data.train[1]: no text in the 1 files"]);
    check("torn.txt.gz", &["torn.txt.gz: cannot be read: "]);
    check("no.parquet", &["no.parquet: not a readable Parquet file"]);
    check("x.parquet.gz", &["x.parquet.gz: a compressed Parquet file"]);
    let mut spec = setup.spec(&["x.parquet"]);
    spec.train[0].field = "body".into();
    let error = setup.error(&spec);
    assert!(
        error.contains("no column \"body\"; set spec.data.train[0].field to one of text, url"),
        "{error}"
    );
    spec.train[0].field = "id".into();
    assert!(setup.error(&spec).contains("column \"id\" holds no text"));
    spec.validation.clear();
    assert!(setup.error(&spec).contains("exactly one of validation and holdOutPercent"));
    let mut spec = setup.spec(&["good.txt"]);
    spec.tokenizer = TokenizerSpec { uri: Some(setup.uri("good.txt")), train: None };
    assert!(setup.error(&spec).starts_with("spec.data.tokenizer.uri: not a Hugging Face tokenizer.json"));
}

fn story(seed: u64, sentences: u64) -> String {
    let words = ["river", "stone", "walked", "under", "the", "old", "bridge", "and", "sang", "quietly"];
    let word = |i: u64| {
        words[(crate::data::permutation::Permutation::new(1 << 40, seed, "story", 0).apply(i) % 10) as usize]
    };
    (0..sentences).map(|s| (0..9).map(|w| word(s * 9 + w)).collect::<Vec<_>>().join(" ") + ".\n").collect()
}

#[test]
fn a_named_tokenizer_and_long_texts_give_the_ids_of_the_whole() {
    let setup = Setup::new();
    let long = story(1, 40_000);
    assert!(long.len() > 1 << 20);
    let text = format!("{}{}", long, "é".repeat(700_000));
    setup.write("a.txt", &text).write("big.txt", story(2, 200_000));
    let first = setup.prepare(&setup.spec(&["a.txt"])).unwrap();
    setup.write("tokenizer.json", first.tokenizer().to_json());
    let mut spec = setup.spec(&["a.txt", "big.txt"]);
    spec.tokenizer = TokenizerSpec { uri: Some(setup.uri("tokenizer.json")), train: None };
    let second = setup.prepare(&spec).unwrap();
    assert_ne!(first.digest(), second.digest());
    assert_eq!(tokens(&first, 0), tokens(&second, 0));
    assert_eq!(documents(&second, 0), [text]);
    // Longer than what is held in memory: read twice.
    let big = story(2, 200_000);
    assert!(big.len() > 8 << 20);
    let mut expected = second.tokenizer().encode(&big).unwrap();
    expected.push(second.tokenizer().separator());
    assert!(tokens(&second, 1) == expected);
}

#[test]
fn long_texts_that_are_not_utf8_are_skipped() {
    let setup = Setup::new();
    let mut bad = story(2, 200_000).into_bytes();
    bad.push(0xc3);
    setup.write("t/bad.txt", bad).write("t/good.txt", "good");
    let dataset = setup.prepare(&setup.spec(&["t/*"])).unwrap();
    assert_eq!(documents(&dataset, 0), ["good"]);
    assert_eq!(dataset.train()[0].skipped, 1);
}

#[test]
fn held_out_documents_are_on_one_side_with_their_duplicates() {
    let setup = Setup::new();
    let texts: Vec<String> = (0..400).map(|i| format!("document number {}", i % 200)).collect();
    let lines: String =
        texts.iter().map(|text| format!("{}\n", serde_json::json!({ "text": text }))).collect();
    setup.write("a.jsonl", &lines);
    let mut spec = setup.spec(&["a.jsonl"]);
    spec.validation.clear();
    spec.hold_out_percent = Some(20.0);
    let dataset = setup.prepare(&spec).unwrap();
    let mut held_out = vec![0; dataset.validation().tokens as usize];
    dataset.read_validation(&mut held_out).unwrap();
    let held_out = split(&dataset, &held_out);
    let kept = documents(&dataset, 0);
    assert!((50..110).contains(&held_out.len()), "{}", held_out.len());
    assert_eq!(kept.len() + held_out.len(), 400);
    assert!(kept.iter().all(|text| !held_out.contains(text)));
    spec.hold_out_percent = Some(0.01);
    let error = setup.error(&spec);
    assert!(error.starts_with("spec.data.holdOutPercent: none of the 400 training documents"), "{error}");
}

#[test]
fn a_sample_of_the_files_is_seeded() {
    let setup = Setup::new();
    for i in 0..50 {
        setup.write(&format!("t/{i:02}.txt"), format!("text {i:03}"));
    }
    let mut spec = setup.spec(&["t/*"]);
    spec.train[0].max_bytes = Some(ByteCount(80));
    let with_seed =
        |seed| prepare(&spec, &setup.storage("out"), &StorageOptions::default(), seed, &|_| {}).unwrap();
    let (first, again, other) = (with_seed(1), with_seed(1), with_seed(2));
    assert_eq!(first.train()[0].documents, 10);
    assert_eq!(first.digest(), again.digest());
    assert_ne!(first.digest(), other.digest());
}

fn small() -> Sizes {
    Sizes { shard_tokens: 100, batch_bytes: 300 }
}

/// Everything in a folder, by name.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
        .collect();
    files.sort();
    files
}

fn mixed(setup: &Setup) -> DataSpec {
    for i in 0..20 {
        setup.write(&format!("t/{i}.txt"), story(i, 5 + i));
    }
    setup.write("a.jsonl", json_lines().repeat(9));
    setup.spec(&["t/*", "a.jsonl"])
}

#[test]
fn threads_and_batches_do_not_change_a_bit() {
    let setup = Setup::new();
    let spec = mixed(&setup);
    let run = |name: &str, threads, sizes| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let storage = setup.storage(name);
        let dataset = pool
            .install(|| prepare_sized(&spec, &storage, &StorageOptions::default(), 1, &|_| {}, sizes))
            .unwrap();
        contents(&setup.folder.path().join(name).join("data").join(dataset.digest()))
    };
    let one = run("one", 1, small());
    assert!(one.len() > 6);
    assert!(one == run("two", 2, small()));
    assert!(one == run("batches", 2, Sizes { batch_bytes: 70, ..small() }));
}

#[test]
fn an_interrupted_preparation_is_done_again() {
    let setup = Setup::new();
    let spec = mixed(&setup);
    let run = |name: &str, progress: &(dyn Fn(Progress) + std::panic::RefUnwindSafe)| {
        let storage = setup.storage(name);
        prepare_sized(&spec, &storage, &StorageOptions::default(), 1, &|p| progress(p), small()).unwrap()
    };
    let whole = run("whole", &|_| {});
    let folder = |name: &str| setup.folder.path().join(name).join("data").join(whole.digest());
    let steps = Mutex::new(0);
    run("count", &|_| *steps.lock().unwrap() += 1);
    let steps = steps.into_inner().unwrap();
    for stop in (0..steps).step_by(3) {
        let step = Mutex::new(0);
        let interrupted = std::panic::catch_unwind(|| {
            run("cut", &|_| {
                let mut step = step.lock().unwrap();
                *step += 1;
                assert!(*step <= stop, "interrupted");
            })
        });
        assert!(interrupted.is_err());
        assert!(Dataset::open(&setup.storage("cut"), whole.digest(), Verification::Sizes).is_err());
    }
    // What a killed write leaves, and a shard of another size.
    std::fs::write(folder("cut").join("train-0-1.bin"), "x").unwrap();
    assert_eq!(run("cut", &|_| {}).digest(), whole.digest());
    assert!(contents(&folder("cut")) == contents(&folder("whole")));
}

#[test]
fn a_prepared_dataset_is_reused() {
    let setup = Setup::new();
    let spec = mixed(&setup);
    let first = setup.prepare(&spec).unwrap();
    let phases = Mutex::new(Vec::new());
    let again = prepare(&spec, &setup.storage("out"), &StorageOptions::default(), 7, &|progress| {
        phases.lock().unwrap().push(progress.phase);
    });
    assert_eq!(again.unwrap().digest(), first.digest());
    assert_eq!(phases.into_inner().unwrap(), [Phase::Listing]);
    setup.write("t/3.txt", "changed");
    assert_ne!(setup.prepare(&spec).unwrap().digest(), first.digest());
}

#[test]
fn a_damaged_shard_is_named() {
    let setup = Setup::new();
    let spec = mixed(&setup);
    let storage = setup.storage("out");
    let prepare = || prepare_sized(&spec, &storage, &StorageOptions::default(), 1, &|_| {}, small());
    let digest = prepare().unwrap().digest().to_owned();
    let shard = setup.folder.path().join("out/data").join(&digest).join("train-0-2.bin");
    let mut content = std::fs::read(&shard).unwrap();
    content[7] ^= 1;
    std::fs::write(&shard, &content).unwrap();
    Dataset::open(&storage, &digest, Verification::Sizes).unwrap();
    let error = prepare().unwrap_err().to_string();
    assert!(
        error.contains("train-0-2.bin: its digest is ") && error.contains("delete the folder "),
        "{error}"
    );
    std::fs::write(&shard, &content[1..]).unwrap();
    let error = Dataset::open(&storage, &digest, Verification::Sizes).unwrap_err().to_string();
    assert!(error.contains("train-0-2.bin: it has 199 bytes, index.json says 200"), "{error}");
    std::fs::remove_file(&shard).unwrap();
    let error = Dataset::open(&storage, &digest, Verification::Sizes).unwrap_err().to_string();
    assert!(error.contains("train-0-2.bin: it is missing"), "{error}");
    let error = Dataset::open(&storage, "0000", Verification::Sizes).unwrap_err().to_string();
    assert!(error.contains("there is no prepared dataset here"), "{error}");
}

#[test]
fn batches_are_sequences_across_shards() {
    let setup = Setup::new();
    let spec = mixed(&setup);
    let storage = setup.storage("out");
    let dataset = prepare_sized(&spec, &storage, &StorageOptions::default(), 1, &|_| {}, small()).unwrap();
    let order = TrainingOrder::new(&dataset, &[2.0, 1.0], 33, 5).unwrap();
    let all = [tokens(&dataset, 0), tokens(&dataset, 1)];
    let (mut inputs, mut targets) = (vec![0; 33 * 64], vec![0; 33 * 64]);
    dataset.batch(&order, 1000, &mut inputs, &mut targets).unwrap();
    let rows = inputs.chunks(33).zip(targets.chunks(33));
    for (sample, (inputs, targets)) in order.samples(1000, 64).into_iter().zip(rows) {
        let start = sample.sequence as usize * 33;
        assert_eq!(inputs, &all[sample.source][start..start + 33]);
        assert_eq!(targets, &all[sample.source][start + 1..start + 34]);
    }
}

#[test]
fn validation_is_evenly_spaced() {
    let setup = Setup::new();
    let mut spec = mixed(&setup);
    spec.validation = vec![setup.source("t/19.txt")];
    let dataset = setup.prepare(&spec).unwrap();
    let available = (dataset.validation().tokens - 1) / 10;
    assert_eq!(dataset.validation_sequences(10, u64::MAX).unwrap(), (0..available).collect::<Vec<_>>());
    let three = dataset.validation_sequences(10, 35).unwrap();
    assert_eq!(three, [0, available / 3, available * 2 / 3]);
    let (mut inputs, mut targets) = (vec![0; 30], vec![0; 30]);
    dataset.validation_batch(10, &three, &mut inputs, &mut targets).unwrap();
    let mut text = vec![0; dataset.validation().tokens as usize];
    dataset.read_validation(&mut text).unwrap();
    assert_eq!(inputs[..10], text[..10]);
    assert_eq!(targets[..10], text[1..11]);
    let error = dataset.validation_sequences(100_000, 1 << 20).unwrap_err().to_string();
    assert!(error.contains("fewer than one sequence of 100000"), "{error}");
}

#[test]
fn large_vocabularies_have_wider_tokens() {
    let setup = Setup::new();
    let mut spec = mixed(&setup);
    let json = setup.prepare(&spec).unwrap().tokenizer().to_json();
    // One token far away makes the vocabulary large.
    let json = json.replacen("<|endoftext|>\":0", "<|endoftext|>\":70000", 1);
    let json = json.replacen("{\"id\":0,", "{\"id\":70000,", 1);
    setup.write("tokenizer.json", json);
    spec.tokenizer = TokenizerSpec { uri: Some(setup.uri("tokenizer.json")), train: None };
    let dataset = setup.prepare(&spec).unwrap();
    assert_eq!(dataset.tokenizer().vocab_size(), 70_001);
    assert_eq!(documents(&dataset, 1)[..4], TEXTS);
    let index = setup.storage("out").join("data").join(dataset.digest()).get(INDEX).unwrap();
    assert_eq!(serde_json::from_slice::<Index>(&index).unwrap().token_bytes, 4);
}

#[test]
fn progress_ends_with_everything() {
    let setup = Setup::new();
    let spec = mixed(&setup);
    let seen = Mutex::new(Vec::new());
    prepare(&spec, &setup.storage("out"), &StorageOptions::default(), 1, &|p| seen.lock().unwrap().push(p))
        .unwrap();
    let seen = seen.into_inner().unwrap();
    let last = seen.last().unwrap();
    assert_eq!(last.phase, Phase::Tokenizing);
    assert_eq!(last.bytes_done, last.bytes_total);
    assert!(
        seen.iter().any(|progress| progress.phase == Phase::TrainingTokenizer && progress.bytes_done > 0)
    );
}

/// Prepares what GROWTH_DATA_URI names and prints the figures: run alone, since the peak is the process's.
#[test]
#[ignore = "measures; needs GROWTH_DATA_URI"]
fn measure() {
    let setup = Setup::new();
    let mut spec = setup.spec(&["v.txt"]);
    spec.validation.clear();
    spec.hold_out_percent = Some(2.0);
    spec.train[0].uri = std::env::var("GROWTH_DATA_URI").unwrap();
    spec.train[0].max_bytes =
        std::env::var("GROWTH_DATA_BYTES").ok().map(|bytes| ByteCount(bytes.parse().unwrap()));
    spec.tokenizer.train = Some(TrainTokenizerSpec { vocab_size: 4096, sample_bytes: ByteCount(16_000_000) });
    let start = std::time::Instant::now();
    let last = Mutex::new(None);
    let dataset = prepare(&spec, &setup.storage("out"), &StorageOptions::default(), 1, &|progress| {
        let mut last = last.lock().unwrap();
        if *last != Some(progress.phase) {
            println!("{:?} from {:.2?}", progress.phase, start.elapsed());
            *last = Some(progress.phase);
        }
    });
    let dataset = dataset.unwrap();
    println!("prepared in {:.2?}: {:?}", start.elapsed(), dataset.train()[0]);
    let start = std::time::Instant::now();
    Dataset::open(&setup.storage("out"), dataset.digest(), Verification::Content).unwrap();
    println!("opened in {:.2?}", start.elapsed());
    let order = TrainingOrder::new(&dataset, &[1.0], 512, 1).unwrap();
    let (mut inputs, mut targets) = (vec![0; 512 * 64], vec![0; 512 * 64]);
    let start = std::time::Instant::now();
    (0..100).for_each(|i| dataset.batch(&order, i * 64, &mut inputs, &mut targets).unwrap());
    println!("100 batches of 64 x 512 in {:.2?}", start.elapsed());
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    println!("{}", status.lines().find(|line| line.starts_with("VmHWM")).unwrap());
}
