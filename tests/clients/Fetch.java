import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse.BodyHandlers;

/** {@code java Fetch METHOD URL}: prints the body; ends with 22 where the status is an error. */
public class Fetch {
    public static void main(String[] words) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(words[1]))
            .method(words[0], words[0].equals("GET") ? BodyPublishers.noBody() : BodyPublishers.ofString("x"))
            .build();
        var response = HttpClient.newHttpClient().send(request, BodyHandlers.ofString());
        System.out.println(response.body());
        System.exit(response.statusCode() < 400 ? 0 : 22);
    }
}
