/** For a second user of the machine: the service asks for its token once and answers with a cookie. */

import { useState } from "preact/hooks";
import { ApiError, post } from "../lib/api";
import { t } from "../lib/prefs";
import { Failure } from "../parts/common";

export function TokenPage({ entered }: { entered: () => void }) {
  const [token, setToken] = useState("");
  const [error, setError] = useState<ApiError | null>(null);
  const submit = async (event: Event) => {
    event.preventDefault();
    setError(null);
    try {
      await post("api/login", { token: token.trim() });
      entered();
    } catch (failure) {
      setError(failure as ApiError);
    }
  };
  return (
    <form class="card form narrow" onSubmit={(event) => void submit(event)}>
      <h1>{t("token_title")}</h1>
      <p>{t("token_why")}</p>
      <label>
        <span>{t("token")}</span>
        <input type="password" autocomplete="current-password" required value={token} onInput={(event) => setToken(event.currentTarget.value)} data-token />
      </label>
      <Failure error={error} />
      <button class="primary">{t("enter")}</button>
    </form>
  );
}
