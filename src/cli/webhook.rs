//! `ringfence webhook`: puts the parts of the admission server together and keeps them running.

mod args;
mod ca;
mod certificates;
mod cluster;
mod given;
mod trust;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::future::Either;
use kube::Client;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

pub(super) use self::args::Args;
use self::args::{DeliveryChoice, LogFormat};
use self::certificates::Certificates;
use crate::admission::events::Events;
use crate::admission::lookup::{Constraints, Lookups};
use crate::admission::server::{
    self, Deadline, Handler, HandlerConfig, Limits, Metrics, Shutdown, ready_unless_ending,
};
use crate::propagate::{self, Copies};

/// How long a policy that running pods follow may take to be read and checked.
const CHECK_PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    start_log(args.log_format);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(args))?;
    Ok(ExitCode::SUCCESS)
}

fn start_log(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("RINGFENCE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Json => log.json().init(),
        LogFormat::Text => log.init(),
    }
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let terms = args.terms();
    if terms.ca_life < terms.settle * 10 {
        bail!("--ca-life has to be at least ten times --ca-settle: a rotation needs its time");
    }
    let metrics = Arc::new(Metrics::default());
    let shutdown = Shutdown::default();
    let (trust, trusted) = watch::channel(Err("the certificate is not made yet".to_owned()));
    let ready = ready_unless_ending(shutdown.clone(), move || trusted.borrow().clone());
    let limits = Limits {
        in_flight: args.max_in_flight.into(),
        linger: Duration::from_secs(args.linger),
        ..Limits::default()
    };

    // The health port first: a probe should hear "not ready" and why, not a refused connection.
    let health = TcpListener::bind(args.health_listen)
        .await
        .with_context(|| format!("cannot listen on {} for health checks", args.health_listen))?;
    let health = tokio::spawn(server::serve(
        health,
        None,
        server::health_router(Arc::clone(&metrics), Arc::clone(&ready)),
        limits.clone(),
        shutdown.clone(),
    ));
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {} for reviews", args.listen))?;

    let client = Client::try_default().await.context("cannot find the API server")?;
    let settings = args.settings();
    let images = args.images()?;
    let clients = args.clients()?;
    let certificates = tokio::select! {
        certificates = Certificates::obtain(&client, &args, &trust) => certificates?,
        () = told_to_end() => return Ok(()),
    };

    let (cluster, follow_cluster) = cluster::follow(
        client.clone(),
        args.delivery == DeliveryChoice::Auto,
        settings.delivery,
        args.default_arch.clone(),
    );
    let (lookups, watch_namespaces) = Lookups::new(client.clone(), args.namespace.clone(), images);
    let (events, write_events) = if args.events {
        let instance = std::env::var("HOSTNAME").unwrap_or_else(|_| "ringfence".into());
        let (events, write) = Events::new(client.clone(), instance, Arc::clone(&metrics));
        (Some(events), Either::Left(write))
    } else {
        (None, Either::Right(std::future::pending()))
    };
    let lookups = Arc::new(lookups);
    let constraints = args
        .security_context_constraints
        .as_ref()
        .map(|name| Constraints::new(client.clone(), name.clone()));
    let handler = Handler::new(HandlerConfig {
        lookups: Arc::clone(&lookups),
        constraints,
        copies: Copies::default(),
        settings,
        cluster,
        metrics: Arc::clone(&metrics),
        events,
    });
    let app = server::router(handler, limits.clone(), Arc::clone(&metrics), ready);
    let tls = Arc::new(server::tls_config(certificates.resolver(), clients)?);
    let reviews =
        tokio::spawn(server::serve(listener, Some(tls), app, limits.clone(), shutdown.clone()));
    tracing::info!(address = %args.listen, "serving reviews");

    let background = async {
        tokio::select! {
            () = watch_namespaces => bail!("the watch of namespaces ended"),
            () = write_events => bail!("events are not written"),
            () = follow_cluster => bail!("the look at the cluster's version ended"),
            error = certificates.keep(&client, &args, &metrics, &trust) => Err(error),
            () = keep_in_step(&client, &args.namespace, &lookups, &metrics) => bail!("the watch of policies ended"),
            () = keep_collecting(&client, args.collect) => bail!("copies are not collected"),
        }
    };
    let ended = tokio::select! {
        () = told_to_end() => Ok(()),
        error = background => error,
    };
    tracing::info!(linger = ?limits.linger, "ending");
    tokio::select! {
        () = shutdown.begin(limits.linger) => {}
        () = told_to_end() => bail!("told to end twice"),
    }
    tokio::select! {
        done = reviews => done??,
        () = told_to_end() => bail!("told to end twice"),
    }
    health.abort();
    ended
}

/// The next SIGTERM or SIGINT.
async fn told_to_end() {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers the signals end the process by themselves.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// Has running pods follow their policies, where their namespaces say so.
async fn keep_in_step(client: &Client, namespace: &str, lookups: &Lookups, metrics: &Metrics) {
    let checked = |name| lookups.policies().checked(name, Deadline::after(CHECK_PATIENCE));
    propagate::follow(client, namespace, checked, |followed| metrics.live_policy(followed)).await;
}

async fn keep_collecting(client: &Client, collect: bool) {
    if !collect {
        return std::future::pending().await;
    }
    loop {
        tokio::time::sleep(propagate::COLLECT_INTERVAL).await;
        match propagate::collect_once(client, k8s_openapi::jiff::Timestamp::now()).await {
            Ok(0) => {}
            Ok(deleted) => tracing::info!(deleted, "unused policy copies deleted"),
            Err(error) => tracing::warn!(%error, "policy copies not collected"),
        }
    }
}
