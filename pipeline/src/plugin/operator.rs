//! Operators: the steps of a pipeline. Synchronous and deterministic: no I/O, no clock, no randomness
//! without a seed. Same batches and watermarks in, same batches out, however the batches are cut.

use arrow::datatypes::SchemaRef;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::batch::Batch;
use crate::config::tree::Node;
use crate::config::{At, CheckContext, deserialize};
use crate::error::{Error, Result};
use crate::state::{StateReader, StateWriter};

/// The configuration of an operator: what stands after its name in `steps:`.
pub trait OperatorConfig: DeserializeOwned + JsonSchema + Send + Sync + Sized + 'static {
    /// The step's name in snake_case, the name of the file.
    const TYPE: &'static str;
    /// The page in Markdown: first line one sentence; then what it emits, its state, limits.
    const PAGE: &'static str;
    /// YAML of one step that checks clean over the columns `device_id: string`, `latency_ms: float`, `ts: timestamp`.
    const EXAMPLE: &'static str;

    /// Names of other pipelines that this step reads beside its main input.
    fn side_inputs(&self) -> Vec<At<String>> {
        Vec::new()
    }

    /// Whether what it emits has the columns of its main input, whatever the options: then `check` goes on to the
    /// steps after it even if this one has mistakes.
    fn keeps_columns(&self) -> bool {
        false
    }

    /// Checks the step over its inputs and makes the operator. `inputs[0]` is the step before; then the side
    /// inputs in order. Pure. After problems, [`Planned::broken`] with the best-known columns lets the later steps be
    /// checked all the same; `None` if nothing is known. In both cases at least one problem was reported.
    fn plan(&self, inputs: &[StreamShape], cx: &mut CheckContext<'_>) -> Option<Planned>;
}

/// What flows on an edge, known from the YAML alone.
#[derive(Clone, Debug)]
pub struct StreamShape {
    /// Visible columns, all nullable.
    pub schema: SchemaRef,
    /// The key columns: a window's `group_by`, or a pipeline's `key`. Empty if there are none.
    pub keys: Vec<String>,
    /// Whether a window made the rows: they then carry `window_start`, `window_end`, `stage`, `revision`, and `rows`
    /// unless a step has dropped it.
    pub windowed: bool,
}

/// A checked step.
pub struct Planned {
    /// What it emits.
    pub shape: StreamShape,
    /// The operator, with no state yet.
    pub operator: Box<dyn Operator>,
}

impl Planned {
    /// A step with problems: what it would emit as far as is known, a column of unknown type being of type Null.
    /// The graph is refused, so it never runs.
    pub fn broken(shape: StreamShape) -> Self {
        Self { shape, operator: Box::new(Broken) }
    }
}

/// Stands for an operator that could not be made.
struct Broken;

impl Operator for Broken {
    fn process(&mut self, _input: usize, _batch: Batch, _out: &mut Output) -> Result<()> {
        Err(Error::internal("a step with problems was started"))
    }
}

/// A running operator. Called by one task.
pub trait Operator: Send {
    /// Takes one batch of input `input` (0 is the step before) and pushes what follows from it.
    ///
    /// A stateful operator takes `Final` batches only; the engine drops and counts the others before it.
    fn process(&mut self, input: usize, batch: Batch, out: &mut Output) -> Result<()>;

    /// Event time has reached `time_us`: no row at or before it will come that is not late. Called after the
    /// batch that moved it; the engine forwards the watermark after the rows pushed here. `i64::MAX` is the end.
    fn watermark(&mut self, _time_us: i64, _out: &mut Output) -> Result<()> {
        Ok(())
    }

    /// The earliest event time that rows still held back may carry, if any: the watermark that is forwarded
    /// stays before it.
    fn holds_back_us(&self) -> Option<i64> {
        None
    }

    /// Whether the operator keeps state. It then sees `Final` batches only.
    fn is_stateful(&self) -> bool {
        false
    }

    /// Rows that came too late so far.
    fn late_rows(&self) -> u64 {
        0
    }

    /// Rows so far for which an expression failed (a division by zero): their value was null. The engine
    /// counts them as errors of the pipeline.
    fn failed_rows(&self) -> u64 {
        0
    }

    /// Writes the whole state. Must not change it.
    fn snapshot(&self, _state: &mut StateWriter) {}

    /// Takes over a state that [`Self::snapshot`] of the same configuration wrote. Called before any batch.
    fn restore(&mut self, _state: &mut StateReader<'_>) -> Result<()> {
        Ok(())
    }
}

/// Collects what an operator emits.
#[derive(Debug, Default)]
pub struct Output {
    batches: Vec<Batch>,
}

impl Output {
    /// Emits a batch; an empty one is dropped.
    pub fn push(&mut self, batch: Batch) {
        if !batch.is_empty() {
            self.batches.push(batch);
        }
    }

    /// What was emitted since the last call, in order.
    pub fn take(&mut self) -> Vec<Batch> {
        std::mem::take(&mut self.batches)
    }
}

/// One entry of the list of operators.
#[derive(Clone, Copy)]
pub struct OperatorPlugin {
    /// The step's name.
    pub type_name: &'static str,
    /// The page in Markdown.
    pub page: &'static str,
    /// The example step.
    pub example: &'static str,
    /// JSON Schema of the options.
    pub schema: fn() -> schemars::Schema,
    /// Reads a YAML block.
    pub read: fn(&Node, &mut CheckContext<'_>) -> Option<Box<dyn AnyOperator>>,
}

/// An operator configuration of any type.
pub trait AnyOperator: Send + Sync {
    /// See [`OperatorConfig::side_inputs`].
    fn side_inputs(&self) -> Vec<At<String>>;
    /// See [`OperatorConfig::keeps_columns`].
    fn keeps_columns(&self) -> bool;
    /// See [`OperatorConfig::plan`].
    fn plan(&self, inputs: &[StreamShape], cx: &mut CheckContext<'_>) -> Option<Planned>;
}

impl<T: OperatorConfig> AnyOperator for T {
    fn side_inputs(&self) -> Vec<At<String>> {
        OperatorConfig::side_inputs(self)
    }
    fn keeps_columns(&self) -> bool {
        OperatorConfig::keeps_columns(self)
    }
    fn plan(&self, inputs: &[StreamShape], cx: &mut CheckContext<'_>) -> Option<Planned> {
        OperatorConfig::plan(self, inputs, cx)
    }
}

impl OperatorPlugin {
    /// The entry of `T`.
    pub const fn of<T: OperatorConfig>() -> Self {
        Self {
            type_name: T::TYPE,
            page: T::PAGE,
            example: T::EXAMPLE,
            schema: || schemars::schema_for!(T),
            read: |node, cx| Some(Box::new(deserialize::read::<T>(node, cx)?)),
        }
    }
}
