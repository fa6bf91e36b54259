//! Whether a lock must not be deleted without explicit consent.

use crate::aws::failure::Failure;
use crate::console::visible;
use crate::lock::dynamodb;
use crate::lock::location::LockLocation;
use crate::lock::stores::Stores;

/// Returns the reason for not deleting a lock in a global table without explicit consent. The condition of the delete
/// is checked only in the region that receives the request. So the delete can remove a lock that was taken a moment ago
/// in another region. `None` if the location has no table, or if the table does not have this problem. If the
/// credentials do not permit this check, the table counts as not global, as nearly all tables are.
pub(crate) async fn global_table(stores: &Stores, location: &LockLocation) -> Result<Option<String>, Failure> {
    let Some(table) = &location.table else { return Ok(None) };
    needs_consent(table, dynamodb::describe(&stores.dynamodb, table).await)
}

/// Does the same as [`global_table`] with `described`, the description of `table`.
pub(super) fn needs_consent(
    table: &str,
    described: Result<dynamodb::Description, Failure>,
) -> Result<Option<String>, Failure> {
    match described {
        Ok(described) if described.last_writer_wins() => Ok(Some(describe_global_table(table, &described.replicas))),
        Err(failure) if !failure.is_final() => Err(failure),
        Ok(_) | Err(_) => Ok(None),
    }
}

/// Returns the reason for not releasing a lock in a global table.
fn describe_global_table(table: &str, replicas: &[String]) -> String {
    format!(
        "DynamoDB table {} is a global table ({}), where a delete can remove the lock of a run in another region\n\
         if every run uses the same region, set TFW_RELEASE=auto",
        visible(table),
        visible(&replicas.join(", "))
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::release::retry::tests::failures;

    #[test]
    fn only_a_table_whose_writes_overwrite_each_other_needs_consent() {
        let described = |replicas: &[&str], strong| dynamodb::Description {
            keys: vec!["LockID".into()],
            read_capacity: None,
            items: None,
            replicas: replicas.iter().map(|region| (*region).to_owned()).collect(),
            strong,
        };
        for (replicas, strong, expected) in
            [(&[][..], false, false), (&["eu-west-1"], false, true), (&["eu-west-1"], true, false)]
        {
            let consent = needs_consent("locks", Ok(described(replicas, strong))).unwrap();
            assert_eq!(consent.is_some(), expected, "{replicas:?} {strong}");
            assert!(consent.is_none_or(|reason| reason.contains("locks") && reason.contains("eu-west-1")));
        }
        let (excluding, others, passing) = failures();
        for failure in excluding.into_iter().chain(others) {
            assert_eq!(needs_consent("locks", Err(failure.clone())), Ok(None), "{failure}");
        }
        for failure in passing {
            assert_eq!(needs_consent("locks", Err(failure.clone())), Err(failure), "a later attempt can know it");
        }
    }
}
