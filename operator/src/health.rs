//! `/livez` and `/readyz`.

use crate::controller::Stores;
use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Serves until the process ends. `/readyz` is good once every watch has listed its objects.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(address: SocketAddr, stores: Stores) -> std::io::Result<()> {
    let ready = Arc::new(AtomicBool::new(false));
    let listed = ready.clone();
    tokio::spawn(async move { listed.store(stores.ready().await, Ordering::Relaxed) });
    let routes = Router::new().route("/livez", get(|| async { "ok\n" })).route(
        "/readyz",
        get(move || async move {
            match ready.load(Ordering::Relaxed) {
                true => (StatusCode::OK, "ok\n"),
                false => (StatusCode::SERVICE_UNAVAILABLE, "the watches have not listed yet\n"),
            }
        }),
    );
    axum::serve(tokio::net::TcpListener::bind(address).await?, routes).await
}
