//! Reads the items of a page of a lock table.
//!
//! The SDK makes a map of each item, with a key and a value that it copies. A page has thousands of items, and that
//! took a quarter of the time of a whole scan. So the attributes that a scan needs are read from the text of the
//! response, and the SDK reads the rest of it. It also reads every error, and every response whose items are not as
//! expected. The other attributes of an item are not looked at.
//!
//! The body is read before the SDK sees the response. So its protection against a stalled body does not apply. The
//! timeout of an attempt does, and an attempt whose body ends early is repeated.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use aws_sdk_dynamodb::types::AttributeValue;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::byte_stream::ByteStream;
use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::lease::record::FIELD;

/// The attributes of an item that a scan needs. `None` for an attribute that the item does not have.
#[derive(Debug, Default, PartialEq)]
pub(super) struct ScannedAttributes {
    pub(super) lock_id: Option<AttributeValue>,
    pub(super) info: Option<AttributeValue>,
    /// The lease record, the attribute [`FIELD`].
    pub(super) record: Option<AttributeValue>,
}

impl From<HashMap<String, AttributeValue>> for ScannedAttributes {
    fn from(mut attributes: HashMap<String, AttributeValue>) -> Self {
        let mut take = |name| attributes.remove(name);
        Self { lock_id: take("LockID"), info: take("Info"), record: take(FIELD) }
    }
}

/// The items of the response to the last attempt, as far as they were read.
type Items = Arc<Mutex<Vec<ScannedAttributes>>>;

/// The HTTP client of one request for a page. It takes the items out of the response.
#[derive(Clone, Debug)]
pub(super) struct ItemReader {
    client: SharedHttpClient,
    items: Items,
}

impl ItemReader {
    /// Returns a reader of the response to a request that is sent with `client`.
    pub(super) fn new(client: SharedHttpClient) -> Self {
        Self { client, items: Items::default() }
    }

    /// Returns the items that were taken out of the response. Empty if the SDK has read them.
    pub(super) fn take(&self) -> Vec<ScannedAttributes> {
        std::mem::take(&mut *self.items.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl HttpClient for ItemReader {
    fn http_connector(&self, settings: &HttpConnectorSettings, components: &RuntimeComponents) -> SharedHttpConnector {
        let connector = self.client.http_connector(settings, components);
        SharedHttpConnector::new(ItemConnector { connector, items: Arc::clone(&self.items) })
    }
}

#[derive(Debug)]
struct ItemConnector {
    connector: SharedHttpConnector,
    items: Items,
}

impl HttpConnector for ItemConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let (response, items) = (self.connector.call(request), Arc::clone(&self.items));
        HttpConnectorFuture::new(async move {
            let mut response = response.await?;
            if !response.status().is_success() {
                return Ok(response);
            }
            let body = std::mem::replace(response.body_mut(), SdkBody::taken());
            let body = ByteStream::new(body).collect().await;
            let body = body.map_err(|error| ConnectorError::io(error.into()))?.into_bytes();
            let (found, rest) = match parse(&body) {
                Some((found, rest)) => {
                    // These describe the whole body.
                    for name in ["content-length", "x-amz-crc32"] {
                        response.headers_mut().remove(name);
                    }
                    (found, SdkBody::from(rest))
                }
                None => (Vec::new(), SdkBody::from(body)),
            };
            *items.lock().unwrap_or_else(PoisonError::into_inner) = found;
            *response.body_mut() = rest;
            Ok(response)
        })
    }
}

/// Returns the items of a response, and the response without them. `None` if it is not the response to a scan, or if an
/// attribute has a type that the SDK must read.
fn parse(body: &[u8]) -> Option<(Vec<ScannedAttributes>, Vec<u8>)> {
    let Response { items, rest } = serde_json::from_slice(body).ok()?;
    Some((items, serde_json::to_vec(&rest).ok()?))
}

/// The response to a scan (DynamoDB API reference, Scan).
#[derive(Deserialize)]
struct Response {
    #[serde(rename = "Items")]
    items: Vec<ScannedAttributes>,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

/// The name of an attribute.
#[derive(Deserialize)]
enum Name {
    #[serde(rename = "LockID")]
    LockId,
    Info,
    /// [`FIELD`].
    #[serde(rename = "tf")]
    Record,
    #[serde(other)]
    Other,
}

/// A derived `Deserialize` would also accept an array for an item, and `null` for an attribute.
impl<'de> Deserialize<'de> for ScannedAttributes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = ScannedAttributes;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an item")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<ScannedAttributes, M::Error> {
                let mut item = ScannedAttributes::default();
                while let Some(name) = map.next_key()? {
                    let attribute = match name {
                        Name::LockId => &mut item.lock_id,
                        Name::Info => &mut item.info,
                        Name::Record => &mut item.record,
                        Name::Other => {
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    if attribute.replace(map.next_value::<Attribute>()?.into()).is_some() {
                        return Err(M::Error::custom("an attribute twice"));
                    }
                }
                Ok(item)
            }
        }

        deserializer.deserialize_map(Members)
    }
}

/// An attribute value (DynamoDB API reference, AttributeValue). Neither terraform nor `tf` writes binary values, so
/// they are left to the SDK.
#[derive(Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Attribute {
    S(String),
    N(String),
    Bool(bool),
    Null(bool),
    M(HashMap<String, Self>),
    L(Vec<Self>),
    Ss(Vec<String>),
    Ns(Vec<String>),
}

impl From<Attribute> for AttributeValue {
    fn from(attribute: Attribute) -> Self {
        match attribute {
            Attribute::S(text) => Self::S(text),
            Attribute::N(number) => Self::N(number),
            Attribute::Bool(value) => Self::Bool(value),
            Attribute::Null(value) => Self::Null(value),
            Attribute::M(map) => Self::M(values(map)),
            Attribute::L(list) => Self::L(list.into_iter().map(Into::into).collect()),
            Attribute::Ss(texts) => Self::Ss(texts),
            Attribute::Ns(numbers) => Self::Ns(numbers),
        }
    }
}

fn values(map: HashMap<String, Attribute>) -> HashMap<String, AttributeValue> {
    map.into_iter().map(|(name, value)| (name, value.into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOCK: &str = r#"{"LockID":{"S":"b/k"},"Info":{"S":"{\"ID\":\"a\"}"}}"#;

    fn response(items: &str) -> String {
        format!(r#"{{"Count":1,"Items":[{items}],"LastEvaluatedKey":{{"LockID":{{"S":"b/k"}}}},"ScannedCount":7}}"#)
    }

    #[test]
    fn a_page_is_its_items_and_the_rest_of_the_response() {
        let (items, rest) = parse(response(&format!("{LOCK},{{}}")).as_bytes()).unwrap();
        let text = |text: &str| Some(AttributeValue::S(text.to_owned()));
        let lock = ScannedAttributes { lock_id: text("b/k"), info: text("{\"ID\":\"a\"}"), record: None };
        assert_eq!(items, [lock, ScannedAttributes::default()]);
        let rest: Value = serde_json::from_slice(&rest).unwrap();
        let expected = r#"{"Count":1,"LastEvaluatedKey":{"LockID":{"S":"b/k"}},"ScannedCount":7}"#;
        assert_eq!(rest, serde_json::from_str::<Value>(expected).unwrap());
    }

    #[test]
    fn an_attribute_has_its_type_and_its_content() {
        let map = |value: AttributeValue| AttributeValue::M([("m".to_owned(), value)].into());
        for (text, expected) in [
            (r#"{"S":"a\u0062"}"#, AttributeValue::S("ab".into())),
            (r#"{"N":"1.50"}"#, AttributeValue::N("1.50".into())),
            (r#"{"BOOL":true}"#, AttributeValue::Bool(true)),
            (r#"{"NULL":true}"#, AttributeValue::Null(true)),
            (r#"{"M":{"m":{"N":"7"}}}"#, map(AttributeValue::N("7".into()))),
            (r#"{"L":[{"S":"x"}]}"#, AttributeValue::L(vec![AttributeValue::S("x".into())])),
            (r#"{"SS":["x"]}"#, AttributeValue::Ss(vec!["x".into()])),
            (r#"{"NS":["1"]}"#, AttributeValue::Ns(vec!["1".into()])),
        ] {
            let item = format!(r#"{{"{FIELD}":{text},"Digest":{{"B":"AA=="}}}}"#);
            let (items, _) = parse(response(&item).as_bytes()).unwrap();
            let expected = ScannedAttributes { record: Some(expected), ..ScannedAttributes::default() };
            assert_eq!(items, [expected], "{text}");
        }
    }

    #[test]
    fn what_is_not_as_expected_is_left_to_the_sdk() {
        let with = |info: &str| response(&format!(r#"{{"LockID":{{"S":"b/k"}},"Info":{info}}}"#));
        for text in [
            String::new(),
            "{}".to_owned(),
            "[]".to_owned(),
            "<html>".to_owned(),
            r#"{"ScannedCount":0}"#.to_owned(),
            r#"{"Items":null}"#.to_owned(),
            response(LOCK) + "}",
            with(r#"{"B":"AA=="}"#),
            with(r#"{"M":{"x":{"BS":["AA=="]}}}"#),
            with(r#"{"LATER":"x"}"#),
            with(r#"{"S":"x","N":"7"}"#),
            with(r#"{"S":7}"#),
            with(r#""x""#),
            with("null"),
            with(r#"{"S":"x"},"Info":{"S":"x"}"#),
            response("null"),
            response(r#"[{"S":"b/k"},{"S":"x"},{"S":"x"}]"#),
            r#"{"Items":[],"Items":[]}"#.to_owned(),
            with(&format!("{}{}", r#"{"L":["#.repeat(200), "]}".repeat(200))),
        ] {
            assert!(parse(text.as_bytes()).is_none(), "{text}");
        }
    }
}
