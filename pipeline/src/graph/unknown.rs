//! Columns of which only the name is known, because the step that makes them has a mistake: they are of type Null.
//!
//! What reads such a column is checked once for each type that it may have. What is wrong for every one of them is
//! wrong; all else is a consequence of the first mistake, and not told.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema};

use crate::config::Problems;
use crate::plugin::StreamShape;
use crate::schema::FieldType;

/// The types that are tried: each stands for those that expressions treat alike.
const TRIED: [FieldType; 5] =
    [FieldType::Float, FieldType::Int, FieldType::String, FieldType::Bool, FieldType::Timestamp(None)];

/// Runs `check` over `shapes`, or over what they may be if a column's type is not known. Gives the results, the one with
/// the fewest errors first; tells the problems that all of them have.
pub(super) fn for_every_type<R>(
    shapes: &[StreamShape],
    problems: &mut Problems,
    mut check: impl FnMut(&[StreamShape], &mut Problems) -> R,
) -> Vec<R> {
    if shapes.iter().all(is_known) {
        return vec![check(shapes, problems)];
    }
    let mut tried: Vec<(R, Problems)> = Vec::new();
    for field_type in TRIED {
        let assumed: Vec<StreamShape> = shapes.iter().map(|shape| assume(shape, &field_type.data_type())).collect();
        let mut found = problems.fork();
        tried.push((check(&assumed, &mut found), found));
    }
    tried.sort_by_key(|(_, found)| found.errors());
    if let Some(((_, first), rest)) = tried.split_first() {
        let in_all = |problem: &&_| rest.iter().all(|(_, found)| found.sorted().contains(problem));
        first.sorted().into_iter().filter(in_all).cloned().for_each(|problem| problems.push(problem));
    }
    tried.into_iter().map(|(result, _)| result).collect()
}

/// What can be said of a shape that may be any of `shapes`: a column whose type differs among them is not known.
pub(super) fn common(shapes: &[StreamShape]) -> Option<StreamShape> {
    let (first, rest) = shapes.split_first()?;
    let field = |field: &Arc<Field>| {
        let alike = |shape: &StreamShape| match shape.schema.field_with_name(field.name()) {
            Ok(other) => other.data_type() == field.data_type(),
            Err(_) => true,
        };
        if rest.iter().all(alike) { Arc::clone(field) } else { of_type(field, DataType::Null) }
    };
    let fields: Vec<Arc<Field>> = first.schema.fields().iter().map(field).collect();
    Some(StreamShape { schema: Arc::new(Schema::new(fields)), ..first.clone() })
}

/// Whether the types of all columns are known.
fn is_known(shape: &StreamShape) -> bool {
    shape.schema.fields().iter().all(|field| *field.data_type() != DataType::Null)
}

/// The shape with `data_type` for every column whose type is not known.
fn assume(shape: &StreamShape, data_type: &DataType) -> StreamShape {
    let field = |field: &Arc<Field>| match field.data_type() {
        DataType::Null => of_type(field, data_type.clone()),
        _ => Arc::clone(field),
    };
    let fields: Vec<Arc<Field>> = shape.schema.fields().iter().map(field).collect();
    StreamShape { schema: Arc::new(Schema::new(fields)), ..shape.clone() }
}

fn of_type(field: &Field, data_type: DataType) -> Arc<Field> {
    Arc::new(field.clone().with_data_type(data_type))
}
