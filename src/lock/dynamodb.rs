//! The half of a lock in a DynamoDB table: an item whose `LockID` is the lock's path and whose `Info` is its JSON
//! (backend/remote-state/s3/client.go, `lockWithDynamoDB`).

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::{DisplayErrorContext, SdkError};
use aws_sdk_dynamodb::types::AttributeValue;

use super::release::{Deleted, Failure};
use crate::terraform::backend::CachedBackend;

/// A client for the table of `backend`.
pub(crate) fn client(backend: &CachedBackend, config: &aws_config::SdkConfig) -> Client {
    let mut builder = aws_sdk_dynamodb::config::Builder::from(config);
    let endpoint = super::aws::endpoint(
        backend,
        ["endpoints.dynamodb", "dynamodb_endpoint"],
        ["AWS_ENDPOINT_URL_DYNAMODB", "AWS_DYNAMODB_ENDPOINT"],
    );
    if let Some(endpoint) = endpoint {
        builder = builder.endpoint_url(endpoint);
    }
    Client::from_conf(builder.build())
}

/// Reads the `Info` of the item as it is now (a consistent read). `None` when there is no such item.
///
/// # Errors
/// [`Failure`]; an item without `Info` is one too, for it is no lock.
pub(crate) async fn read(client: &Client, table: &str, path: &str) -> Result<Option<String>, Failure> {
    Ok(attribute(client, table, path, "Info").await?.map(Option::unwrap_or_default))
}

/// The MD5 of the state that terraform wrote last, in an item beside the lock (client.go, `putMD5`).
///
/// # Errors
/// [`Failure`].
pub(crate) async fn digest(client: &Client, table: &str, path: &str) -> Result<Option<String>, Failure> {
    Ok(attribute(client, table, &format!("{path}-md5"), "Digest").await?.flatten())
}

/// The string attribute `name` of an item: the outer `None` for no item, the inner for no such attribute.
async fn attribute(client: &Client, table: &str, path: &str, name: &str) -> Result<Option<Option<String>>, Failure> {
    let answer = client
        .get_item()
        .table_name(table)
        .key("LockID", AttributeValue::S(path.to_owned()))
        .projection_expression("LockID, #name")
        .expression_attribute_names("#name", name)
        .consistent_read(true)
        .send()
        .await
        .map_err(|error| failure(&error))?;
    Ok(answer.item.map(|item| item.get(name).and_then(|value| value.as_s().ok()).cloned()))
}

/// Deletes the item on condition that its `Info` is, byte for byte, the one that was read. Never `contains`: an empty
/// or partial ID matches that.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn delete(client: &Client, table: &str, path: &str, info: &str) -> Result<Deleted, Failure> {
    let answer = client
        .delete_item()
        .table_name(table)
        .key("LockID", AttributeValue::S(path.to_owned()))
        .condition_expression("Info = :info")
        .expression_attribute_values(":info", AttributeValue::S(info.to_owned()))
        .send()
        .await;
    match answer {
        Ok(_) => Ok(Deleted::Yes),
        Err(error)
            if error.as_service_error().is_some_and(
                aws_sdk_dynamodb::operation::delete_item::DeleteItemError::is_conditional_check_failed_exception,
            ) =>
        {
            Ok(Deleted::Changed)
        }
        Err(error) => Err(failure(&error)),
    }
}

fn failure<E, R>(error: &SdkError<E, R>) -> Failure
where
    E: std::error::Error + aws_sdk_dynamodb::error::ProvideErrorMetadata + 'static,
    R: std::fmt::Debug,
{
    Failure::new(
        "DynamoDB",
        error.as_service_error().and_then(aws_sdk_dynamodb::error::ProvideErrorMetadata::code),
        error.as_service_error().and_then(aws_sdk_dynamodb::error::ProvideErrorMetadata::message),
        &DisplayErrorContext(error).to_string(),
    )
}
