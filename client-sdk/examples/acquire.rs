//! Asks a server once, and prints what it says: `acquire POLICY KEY COST [ADDRESS [NAMESPACE]]`.

use std::{env, error::Error, process::ExitCode};

use fusebox_client::unary::{Ask, Client};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match ask().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn ask() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [policy, key, cost, rest @ ..] = arguments.as_slice() else {
        return Err("usage: acquire POLICY KEY COST [ADDRESS [NAMESPACE]]".into());
    };
    let address = rest.first().map_or("http://127.0.0.1:3873", String::as_str);
    let namespace = rest.get(1).map_or("demo", String::as_str);

    let client = Client::connect(address, namespace).await?;
    let acquired = client.acquire([Ask::new(policy, key).cost(cost.parse()?)]).await?;
    let verdict = acquired.verdicts.first().ok_or("no verdict")?;
    match (acquired.allowed, verdict.remaining, acquired.retry_after()) {
        (true, Some(remaining), _) => println!("allowed; {remaining} left"),
        // A circuit has nothing that could be used up.
        (true, None, _) => println!("allowed"),
        (false, _, Some(wait)) => println!("denied; again in {wait:?}"),
        (false, ..) => println!("denied, for good"),
    }
    Ok(())
}
